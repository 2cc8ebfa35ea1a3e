// Conversations and settings, kept in this browser and nowhere else.

const STORE = 'st-tool';
const SETTINGS = ['system', 'temperature', 'max', 'seed', 'key'];

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) || '{}');
    const isMessage = (m) => m && (m.role === 'user' || m.role === 'assistant') && typeof m.content === 'string';
    const isWhole = (c) => c && typeof c.id === 'string' && Array.isArray(c.messages) && c.messages.every(isMessage);
    return {
      conversations: (Array.isArray(kept.conversations) ? kept.conversations : []).filter(isWhole),
      current: typeof kept.current === 'string' ? kept.current : '',
      settings: kept.settings && typeof kept.settings === 'object' ? kept.settings : {},
      panels: kept.panels && typeof kept.panels === 'object' ? kept.panels : {},
    };
  } catch {
    return { conversations: [], current: '', settings: {}, panels: {} };
  }
}

const state = load();

// What another window has written since is kept: this one writes what it has changed.
function save(conversation) {
  const kept = load();
  if (conversation) {
    const others = kept.conversations.filter((c) => c.id !== conversation.id);
    kept.conversations = conversation.deleted ? others : [conversation, ...others];
    state.conversations = [...kept.conversations];
    const index = state.conversations.findIndex((c) => c.id === conversation.id);
    if (index >= 0) state.conversations[index] = conversation;
  }
  const whole = { conversations: kept.conversations, current: state.current, settings: state.settings, panels: state.panels };
  for (;;) {
    try {
      localStorage.setItem(STORE, JSON.stringify(whole));
      return;
    } catch {
      // There is no room: the conversation that was used least lately goes.
      if (whole.conversations.length < 2) return;
      whole.conversations.pop();
    }
  }
}

const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(3)), (n) => n.toString(36)).join('');

function current() {
  return state.conversations.find((c) => c.id === state.current) || null;
}

function title(conversation) {
  const first = conversation.messages.find((m) => m.role === 'user');
  return (first?.content || 'Empty').trim().replace(/\s+/g, ' ').slice(0, 60) || 'Empty';
}
