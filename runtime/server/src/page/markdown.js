// Markdown to elements. Text becomes text nodes and nothing else: whatever the model writes, none of it is HTML.

const make = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === 'class') element.className = value;
    else if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
};

// Code, links, bold, italic, struck out, in the order in which they bind.
const INLINE = [
  [/(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/, (m) => make('code', {}, m[2])],
  [/\[([^\]\n]{1,400})\]\(([^()\s]{1,2000})\)/, (m) => link(m[2], inline(m[1]))],
  [/https?:\/\/[^\s<>"')\]]{1,2000}/, (m) => link(m[0], [m[0]])],
  [/\*\*(?=\S)([\s\S]*?\S)\*\*/, (m) => make('strong', {}, ...inline(m[1]))],
  [/~~(?=\S)([\s\S]*?\S)~~/, (m) => make('s', {}, ...inline(m[1]))],
  [/(?<![\w*])\*(?=[^\s*])([^*]*?[^\s*])\*(?![\w*])/, (m) => make('em', {}, ...inline(m[1]))],
  [/(?<!\w)_(?=[^\s_])([^_]*?[^\s_])_(?!\w)/, (m) => make('em', {}, ...inline(m[1]))],
];

function link(address, children) {
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return make('span', {}, ...children);
  return make('a', { href: address, rel: 'noopener noreferrer nofollow', target: '_blank' }, ...children);
}

function inline(text, depth = 0) {
  if (depth > 8) return [text];
  let first = null;
  for (const [pattern, build] of INLINE) {
    const match = pattern.exec(text);
    if (match && (!first || match.index < first.match.index)) first = { match, build };
  }
  if (!first) return text ? [text] : [];
  const { match, build } = first;
  const before = text.slice(0, match.index);
  const after = text.slice(match.index + match[0].length);
  return [...(before ? [before] : []), build(match), ...inline(after)];
}

const lines = (text) => text.split('\n').flatMap((line, i) => (i ? [make('br'), ...inline(line)] : inline(line)));

// A text in blocks: paragraphs, and whatever begins a line of its own.
function blocks(text) {
  const rows = text.split('\n');
  const out = [];
  for (let i = 0; i < rows.length; ) {
    const fence = /^\s{0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(rows[i]);
    const from = i;
    let kind = 'p';
    if (fence) {
      const closes = (row) => row.trim().startsWith(fence[1]) && /^[`~]+$/.test(row.trim());
      for (i += 1; i < rows.length && !closes(rows[i]); i += 1);
      i = Math.min(i + 1, rows.length);
      kind = 'code';
    } else if (!rows[i].trim()) {
      i += 1;
      continue;
    } else if (/^\s{0,3}#{1,6}\s/.test(rows[i])) {
      i += 1;
      kind = 'heading';
    } else if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(rows[i])) {
      i += 1;
      kind = 'rule';
    } else {
      const starts = [['quote', /^\s{0,3}>/], ['list', /^\s*([-*+]|\d{1,9}[.)])\s/], ['table', /^\s*\|.*\|\s*$/]];
      kind = (starts.find(([, start]) => start.test(rows[i])) || ['p'])[0];
      const goesOn = {
        quote: (row) => /^\s{0,3}>/.test(row),
        list: (row) => starts[1][1].test(row) || /^\s{2,}\S/.test(row),
        table: (row) => starts[2][1].test(row),
        p: (row) => row.trim() && !/^\s{0,3}(#{1,6}\s|`{3}|~{3}|>)/.test(row) && !starts.some(([, s]) => s.test(row)),
      }[kind];
      for (i += 1; i < rows.length && goesOn(rows[i]); i += 1);
    }
    out.push({ kind, source: rows.slice(from, i).join('\n') });
  }
  return out;
}

const BUILD = {
  p: (source) => make('p', {}, ...lines(source)),
  rule: () => make('hr'),
  heading: (source) => make(`h${Math.min(5, 2 + source.trim().search(/[^#]/))}`, {}, ...inline(source.replace(/^\s*#+\s*|\s*#*\s*$/g, ''))),
  quote: (source) => make('blockquote', {}, ...lines(source.replace(/^\s{0,3}> ?/gm, ''))),
  code: (source) => {
    const [, fence, name] = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(source);
    const rows = source.split('\n').slice(1);
    if (rows.length && rows[rows.length - 1].trim().startsWith(fence)) rows.pop();
    const code = rows.join('\n');
    const button = make('button', { type: 'button', onclick: () => copy(code, button) }, 'Copy');
    return make('div', { class: 'code' }, make('div', {}, name || 'text', button), make('pre', { tabindex: '0' }, make('code', {}, code)));
  },
  table: (source) => {
    const rows = source.split('\n').map((row) => row.trim().replace(/^\||\|$/g, '').split('|').map((cell) => cell.trim()));
    const isRule = (row) => row.every((cell) => /^:?-+:?$/.test(cell));
    const head = rows.length > 1 && isRule(rows[1]);
    const row = (cells, name) => make('tr', {}, ...cells.map((cell) => make(name, {}, ...inline(cell))));
    const body = rows.filter((cells) => !isRule(cells)).map((cells, i) => row(cells, head && i === 0 ? 'th' : 'td'));
    return make('div', { class: 'wide', tabindex: '0' }, make('table', {}, ...body));
  },
  list: (source) => {
    // Deeper items hang below the latest of a level above.
    const levels = [];
    let top = null;
    for (const row of source.split('\n')) {
      const [, space, mark, text] = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/.exec(row) || [];
      if (mark === undefined) {
        const last = levels[levels.length - 1];
        if (last?.item) last.item.append(' ', ...inline(row.trim()));
        continue;
      }
      while (levels.length > 1 && levels[levels.length - 1].indent > space.length) levels.pop();
      let level = levels[levels.length - 1];
      if (!level || (space.length > level.indent + 1 && levels.length < 6)) {
        const number = Number.parseInt(mark, 10);
        const list = Number.isNaN(number) ? make('ul') : make('ol', { start: String(number) });
        if (level?.item) level.item.append(list);
        else top = list;
        level = { indent: space.length, list, item: null };
        levels.push(level);
      }
      level.item = make('li', {}, ...inline(text));
      level.list.append(level.item);
    }
    return top || make('p', {}, source);
  },
};

// Shows `text` in `element`; what has not changed since the last time stays as it is.
function showMarkdown(element, text) {
  const wanted = blocks(text);
  const shown = element.shown || [];
  let same = 0;
  while (same < shown.length && same < wanted.length && shown[same].source === wanted[same].source && shown[same].kind === wanted[same].kind) same += 1;
  shown.splice(same).forEach((block) => block.node.remove());
  for (const { kind, source } of wanted.slice(same)) {
    const node = BUILD[kind](source);
    element.append(node);
    shown.push({ kind, source, node });
  }
  element.shown = shown;
}

async function copy(text, button) {
  const said = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = 'Copied';
  } catch {
    // Pages without a secure context have no clipboard.
    const field = make('textarea', { class: 'sr' });
    field.value = text;
    document.body.append(field);
    field.select();
    button.textContent = document.execCommand('copy') ? 'Copied' : 'Not copied';
    field.remove();
    button.focus();
  }
  setTimeout(() => { button.textContent = said; }, 1500);
}
