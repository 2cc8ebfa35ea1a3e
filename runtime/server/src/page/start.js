// Everything is put together, once.

async function greet() {
  const said = await fetch('health').then((response) => response.json()).catch(() => null);
  const loading = said?.error?.progress ?? said?.progress;
  if (!said || loading !== undefined) {
    $('state').textContent = said ? `loading the model: ${Math.round(100 * loading)} %` : 'the server does not answer';
    setTimeout(greet, 1000);
    return;
  }
  $('state').textContent = '';
  try {
    const models = await (await request('v1/models')).json();
    const model = models.data?.[0];
    if (!model) return;
    $('model').textContent = model.id;
    document.title = `${model.id} · st-tool`;
  } catch (error) {
    $('state').textContent = error.message;
    if (error.status === 401) askForKey();
  }
  watch();
}

for (const name of SETTINGS) {
  $(name).value = state.settings[name] || '';
  $(name).addEventListener('change', () => {
    state.settings[name] = $(name).value;
    save();
    if (name === 'key') greet();
  });
}
$('new').addEventListener('click', begin);
$('stop').addEventListener('click', stop);
$('composer').addEventListener('submit', (event) => {
  event.preventDefault();
  submit();
});
say.addEventListener('input', grow);
for (const name of ['list', 'machine']) {
  $(`show-${name}`).addEventListener('click', () => { panel(name); save(); });
  panel(name, wide.matches && (state.panels[name] ?? true));
}
document.addEventListener('keydown', keys);
document.addEventListener('visibilitychange', watch);
$('grid').addEventListener('mousemove', pointed);
addEventListener('resize', draw);
addEventListener('pagehide', () => {
  leaving = true;
  if (answering) save(answering.conversation);
});
addEventListener('pageshow', () => { leaving = false; });
// An answer that was under way when the page was left stays as far as it came.
for (const conversation of state.conversations) {
  const last = conversation.messages.at(-1);
  if (last?.role === 'assistant' && !last.note && !last.error) last.note = 'cut off: Again makes it anew';
}
show();
greet();
say.focus();
