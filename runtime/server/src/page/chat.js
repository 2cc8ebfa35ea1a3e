// The conversation: what is shown of it, and its answers as they are made.

const $ = (id) => document.getElementById(id);
const log = $('log');
const say = $('say');
const wide = matchMedia('(min-width: 60.01rem)');
// The answer under way: its conversation, message, and how to end it.
let answering = null;
// Set once the page is left: what fails from then on is nobody's fault.
let leaving = false;

function show() {
  const conversation = current();
  log.replaceChildren();
  conversation?.messages.forEach((message, index) => log.append(article(conversation, message, index)));
  if (!conversation?.messages.length) log.append(make('p', { class: 'quiet' }, 'What you say stays between this browser and the server that this page came from.'));
  log.scrollTop = log.scrollHeight;
  showList();
}

function showList() {
  const items = state.conversations.map((c) => {
    const open = make('button', { type: 'button', title: title(c), onclick: () => choose(c.id) }, title(c));
    if (c.id === state.current) open.setAttribute('aria-current', 'true');
    const remove = make('button', { type: 'button', title: 'Delete', 'aria-label': `Delete ${title(c)}`, onclick: () => forget(c) }, '✕');
    return make('li', {}, open, remove);
  });
  $('conversations').replaceChildren(...items);
}

function article(conversation, message, index) {
  const text = make('div', { class: 'text' });
  const tools = make('div', { class: 'tools' });
  const name = message.role === 'user' ? 'You' : 'Answer';
  const whole = make('article', { class: message.role, 'aria-label': name }, make('div', { class: 'who' }, name), text, tools);
  fill(whole, conversation, message, index);
  return whole;
}

function fill(whole, conversation, message, index) {
  const [text, tools] = [whole.querySelector('.text'), whole.querySelector('.tools')];
  if (message.role === 'user') text.textContent = message.content;
  else showMarkdown(text, message.content);
  const busy = answering?.message === message;
  text.classList.toggle('waits', busy);
  whole.setAttribute('aria-busy', String(busy));
  if (busy) return;
  const copies = make('button', { type: 'button', onclick: () => copy(message.content, copies) }, 'Copy');
  const buttons = [copies];
  if (message.role === 'user') buttons.push(make('button', { type: 'button', class: 'edit', onclick: () => edit(whole, conversation, index) }, 'Edit'));
  else if (index === conversation.messages.length - 1) buttons.push(make('button', { type: 'button', class: 'again', title: 'Alt+R', onclick: again }, 'Again'));
  tools.replaceChildren(...buttons);
  if (message.note) tools.append(make('span', { class: 'quiet' }, message.note));
  if (message.error) tools.append(make('span', { class: 'error', role: 'alert' }, message.error));
}

// Shows `message` anew, and stays at the end of the log where the reader is there.
function refresh(conversation, message) {
  if (conversation.id !== state.current) return;
  const index = conversation.messages.indexOf(message);
  const whole = log.children[index];
  if (!whole) return;
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  fill(whole, conversation, message, index);
  if (follows) log.scrollTop = log.scrollHeight;
}

function edit(whole, conversation, index) {
  stop();
  const field = make('textarea', { rows: '3', 'aria-label': 'Message' });
  field.value = conversation.messages[index].content;
  const done = (send) => {
    if (send && field.value.trim()) {
      conversation.messages.splice(index);
      ask(conversation, field.value);
    } else {
      show();
      say.focus();
    }
  };
  field.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') done(false);
    else if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) done(true);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const send = make('button', { type: 'button', onclick: () => done(true) }, 'Send');
  const cancel = make('button', { type: 'button', onclick: () => done(false) }, 'Leave as it was');
  whole.querySelector('.text').replaceChildren(field);
  whole.querySelector('.tools').replaceChildren(send, cancel);
  field.focus();
}

function ask(conversation, text) {
  conversation.messages.push({ role: 'user', content: text });
  answer(conversation);
}

function again() {
  const conversation = current();
  if (!conversation || answering) return;
  while (conversation.messages.at(-1)?.role === 'assistant') conversation.messages.pop();
  if (conversation.messages.length) answer(conversation);
}

function body(messages) {
  const { system, temperature, max, seed } = state.settings;
  const number = (text) => (text === undefined || text === '' || Number.isNaN(Number(text)) ? undefined : Number(text));
  const said = messages.filter((m) => m.content || m.role === 'user').map(({ role, content }) => ({ role, content }));
  return JSON.stringify({
    messages: [...(system?.trim() ? [{ role: 'system', content: system }] : []), ...said],
    stream: true,
    stream_options: { include_usage: true },
    temperature: number(temperature),
    max_tokens: number(max),
    seed: number(seed),
  });
}

async function answer(conversation) {
  stop();
  const messages = conversation.messages.slice();
  const message = { role: 'assistant', content: '' };
  const abort = new AbortController();
  const mine = { conversation, message, abort };
  answering = mine;
  conversation.messages.push(message);
  state.current = conversation.id;
  save(conversation);
  show();
  busy();
  let [frame, saved] = [0, Date.now()];
  const paint = () => {
    frame = 0;
    refresh(conversation, message);
    if (Date.now() - saved > 500) {
      saved = Date.now();
      save(conversation);
    }
  };
  try {
    const response = await request('v1/chat/completions', { method: 'POST', body: body(messages), signal: abort.signal });
    for await (const data of events(response)) {
      if (data === '[DONE]' || abort.signal.aborted) break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices?.[0];
      message.content += choice?.delta?.content || '';
      if (choice?.finish_reason === 'length') message.note = 'cut off at the limit';
      if (chunk.usage) message.note = [message.note, facts(chunk)].filter(Boolean).join(' · ');
      if (!frame) frame = requestAnimationFrame(paint);
    }
  } catch (error) {
    if (leaving) return;
    if (!abort.signal.aborted) message.error = error.message;
    if (error.status === 401) askForKey();
  }
  if (abort.signal.aborted) message.note = 'stopped';
  cancelAnimationFrame(frame);
  if (answering === mine) answering = null;
  if (!conversation.deleted) save(conversation);
  refresh(conversation, message);
  showList();
  busy();
}

function facts({ usage, timings, seed }) {
  const cached = usage.prompt_tokens_details?.cached_tokens;
  const parts = [`${usage.completion_tokens} tokens`];
  if (timings?.predicted_per_second) parts.push(`${timings.predicted_per_second.toFixed(1)} a second`);
  parts.push(`prompt ${usage.prompt_tokens}${cached ? `, ${cached} known` : ''}`);
  if (seed !== undefined) parts.push(`seed ${seed}`);
  return parts.join(' · ');
}

function stop() {
  answering?.abort.abort();
  answering = null;
  busy();
}

function busy() {
  $('send').hidden = Boolean(answering);
  $('stop').hidden = !answering;
}

function begin() {
  stop();
  state.current = '';
  save();
  show();
  say.focus();
}

function choose(id) {
  state.current = id;
  if (!wide.matches) panel('list', false);
  save();
  show();
  say.focus();
}

function forget(conversation) {
  if (answering?.conversation === conversation) stop();
  conversation.deleted = true;
  save(conversation);
  show();
  say.focus();
}

function grow() {
  say.style.height = 'auto';
  say.style.height = `${Math.min(say.scrollHeight + 2, innerHeight * 0.4)}px`;
}

function submit() {
  const text = say.value.trim();
  if (!text || answering) return;
  say.value = '';
  grow();
  ask(current() || { id: newId(), messages: [] }, text);
}

function panel(name, open) {
  const is = open ?? !document.body.classList.contains(`with-${name}`);
  document.body.classList.toggle(`with-${name}`, is);
  $(`show-${name}`).setAttribute('aria-expanded', String(is));
  if (wide.matches) state.panels[name] = is;
  if (name === 'machine') watch();
}

function askForKey() {
  $('settings').open = true;
  $('key').focus();
}

function keys(event) {
  if (event.isComposing) return;
  const alt = event.altKey && !event.ctrlKey && !event.metaKey && event.code;
  const latest = () => [...log.querySelectorAll('article.user .edit')].at(-1);
  const shortcuts = { KeyN: begin, KeyR: again, KeyM: () => panel('machine'), KeyC: () => panel('list') };
  const writes = /^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (alt && shortcuts[alt]) shortcuts[alt]();
  else if (event.key === 'Escape' && answering) stop();
  else if (event.key === 'Escape' && !wide.matches) ['list', 'machine'].forEach((name) => panel(name, false));
  else if (event.key === '/' && !writes) say.focus();
  else if (event.target === say && event.key === 'Enter' && !event.shiftKey) submit();
  else if (event.target === say && event.key === 'ArrowUp' && !say.value && latest()) latest().click();
  else return;
  event.preventDefault();
}
