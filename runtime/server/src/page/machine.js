// What the machine does: figures, and the experts as they fire.

const grid = { layers: 0, experts: 0, heat: new Float32Array(0), read: new Float32Array(0), used: new Float64Array(0), drawn: 0 };
let watching = null;

const bytes = (n) => (n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(2)} GiB` : `${Math.round(n / 2 ** 20)} MiB`);

// Follows the server's events while the panel is open and the page is seen.
async function watch() {
  const wanted = document.body.classList.contains('with-machine') && !document.hidden;
  if (!wanted) {
    watching?.abort();
    watching = null;
    return;
  }
  if (watching) return;
  const mine = new AbortController();
  watching = mine;
  let wait = 500;
  while (watching === mine) {
    try {
      const response = await request('experts', { signal: mine.signal });
      wait = 500;
      let before = null;
      for await (const data of events(response)) before = step(JSON.parse(data), before);
    } catch (error) {
      if (error.status === 401) $('state').textContent = 'the server wants a key: see the settings';
      if (error.status === 404) return;
    }
    await new Promise((done) => setTimeout(done, wait));
    wait = Math.min(wait * 2, 10000);
  }
}

function step(now, before) {
  if (now.layers !== grid.layers || now.experts !== grid.experts) {
    const cells = now.layers * now.experts;
    Object.assign(grid, { layers: now.layers, experts: now.experts, heat: new Float32Array(cells), read: new Float32Array(cells), used: new Float64Array(cells) });
  }
  // Of each use as much is left after a second as is made visible by one more.
  for (let i = 0; i < grid.heat.length; i += 1) {
    grid.heat[i] *= 0.75;
    grid.read[i] *= 0.8;
  }
  for (const [cell, times] of now.used) {
    grid.used[cell] += times;
    grid.heat[cell] = Math.min(1, grid.heat[cell] + 0.35 + 0.1 * Math.log2(times));
  }
  for (const cell of now.read) grid.read[cell] = 1;
  draw();
  figures(now, before);
  return now;
}

function figures(now, before) {
  const seconds = before ? (now.ms - before.ms) / 1000 : 0;
  const rate = (name) => (seconds > 0 ? (now[name] - before[name]) / seconds : 0);
  const slow = (element, value) => {
    // Shown over about two seconds, so that it can be read.
    element.rate = (element.rate || 0) * 0.8 + value * 0.2;
    element.textContent = element.rate < 0.05 ? '–' : element.rate.toFixed(1);
  };
  slow($('rate'), rate('made'));
  slow($('reading'), rate('prompt'));
  const { resident, budget } = now;
  $('memory').textContent = budget ? `${bytes(resident)} of ${bytes(budget)}` : bytes(resident);
  $('budget').hidden = !budget;
  if (budget) $('budget').value = resident / budget;
  $('hits').textContent = now.lookups ? `${((100 * now.hits) / now.lookups).toFixed(1)} %` : '–';
  $('disk').textContent = bytes(now.bytes_read);
  $('busy').textContent = now.waiting ? `${now.busy} of ${now.parallel}, ${now.waiting} wait` : `${now.busy} of ${now.parallel}`;
}

function size() {
  const canvas = $('grid');
  const width = canvas.clientWidth || 300;
  const cell = Math.max(2, width / Math.max(1, grid.experts));
  return { canvas, width, cell, height: Math.ceil(cell * grid.layers) };
}

function draw() {
  const { canvas, width, cell, height } = size();
  const scale = devicePixelRatio || 1;
  const style = getComputedStyle(document.documentElement);
  const [empty, lit, ring] = ['--cell', '--lit', '--ring'].map((name) => style.getPropertyValue(name).trim());
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const paint = canvas.getContext('2d');
  paint.setTransform(scale, 0, 0, scale, 0, 0);
  paint.clearRect(0, 0, width, height);
  const gap = cell > 5 ? 1 : 0.5;
  for (let i = 0; i < grid.heat.length; i += 1) {
    const [x, y] = [(i % grid.experts) * cell, Math.floor(i / grid.experts) * cell];
    paint.fillStyle = empty;
    paint.fillRect(x, y, cell - gap, cell - gap);
    if (grid.heat[i] > 0.02) {
      paint.fillStyle = `rgba(${lit}, ${grid.heat[i]})`;
      paint.fillRect(x, y, cell - gap, cell - gap);
    }
    if (grid.read[i] > 0.1) {
      paint.globalAlpha = grid.read[i];
      paint.strokeStyle = ring;
      paint.lineWidth = Math.max(1, cell / 6);
      paint.strokeRect(x + 0.5, y + 0.5, cell - gap - 1, cell - gap - 1);
      paint.globalAlpha = 1;
    }
  }
  grid.drawn += 1;
}

function pointed(event) {
  const { canvas, cell } = size();
  const box = canvas.getBoundingClientRect();
  const [expert, layer] = [Math.floor((event.clientX - box.left) / cell), Math.floor((event.clientY - box.top) / cell)];
  const times = grid.used[layer * grid.experts + expert];
  $('under').textContent = expert < grid.experts && layer < grid.layers ? `Layer ${layer}, expert ${expert}: used ${times} times since this page was opened` : '';
}
