// The conversations at the side. Kept in this browser (localStorage), or by the server where there is a login.
// Each has a version: whoever writes names the version it was made from, and where another tab was faster, what this
// tab has goes on as a conversation of its own. What people and models wrote is only ever read and written as text.
(() => {
  const KEY = 'almost-chat/';  // + the conversation's number
  const OPEN = 'almost-chat-open';  // of this tab (sessionStorage)
  const SETTINGS = 'almost-chat-settings';
  const FULL = 'This browser has no room for more: delete a conversation.';
  const lock = (work) => (navigator.locks ? navigator.locks.request('almost-chat', work) : work());

  // --- two keepers, alike: search, read, write, remove ---

  const inBrowser = {
    read: async (id) => JSON.parse(localStorage.getItem(KEY + id) || 'null'),
    async search(words) {
      const needle = folded(words);
      const records = [];
      for (let i = 0; i < localStorage.length; i += 1) {
        const key = localStorage.key(i);
        if (!key.startsWith(KEY)) continue;
        try {
          const record = JSON.parse(localStorage.getItem(key));
          const turns = record.conversation.turns;
          const said = turns.flatMap((turn) => [turn.user, turn.reply ? turn.reply.text : '']);
          if (folded([record.name, ...said].join(' ')).includes(needle)) records.push(record);
        } catch (error) { console.info(`${key}: ${error}`); }  // not ours, or torn: stays, unseen
      }
      return records.sort((one, other) => other.updated - one.updated);
    },
    write: (record) => lock(() => {
      const now = JSON.parse(localStorage.getItem(KEY + record.id) || 'null');
      if ((now ? now.version : 0) !== record.version) return null;
      const version = record.version + 1;
      try {
        localStorage.setItem(KEY + record.id, JSON.stringify({...record, version, updated: Date.now() / 1000}));
      } catch (error) { throw new Error(FULL); }
      return version;
    }),
    remove: async (id) => localStorage.removeItem(KEY + id),
  };

  async function ask(path, options = {}) {
    const answer = await fetch(new URL(`conversations${path}`, document.baseURI), options);
    if (answer.ok) return answer.status === 204 ? null : answer.json();
    const told = await answer.json().catch(() => ({}));
    throw Object.assign(new Error(told.error || `The server answered ${answer.status}.`), {status: answer.status});
  }

  const onServer = {
    search: (words) => ask(`?search=${encodeURIComponent(words)}`),
    read: (id) => ask(`/${id}`).catch((error) => { if (error.status === 404) return null; throw error; }),
    write: (record) => ask(`/${record.id}`, {method: 'PUT', body: JSON.stringify(record)}).then(
      (told) => told.version,
      (error) => { if (error.status === 409) return null; throw error; },
    ),
    remove: (id) => ask(`/${id}`, {method: 'DELETE'}),
  };

  // --- state of this tab ---

  const oneLine = (text) => text.split(/\s+/).join(' ').trim();
  const folded = (text) => oneLine(text.toLowerCase());
  const fresh = () => [...crypto.getRandomValues(new Uint8Array(8))].map((n) => n.toString(16).padStart(2, '0')).join('');
  const known = new Map();  // the server's number -> {id, version, name, said}: as which it is kept, and what was last
  let removed = null;  // the record that was deleted last
  const keeper = window.almostKeeper === 'server' ? onServer : inBrowser;
  let root = null;
  let tell = () => {};
  let queue = Promise.resolve();
  let current = '';  // number that is shown as open

  const part = (selector) => root && root.querySelector(selector);
  function status(sentence, undo) {
    const line = part('[role=status]');
    if (!line) return;
    line.textContent = sentence;
    if (undo) line.append(' ', pressed('Undo', 'Bring the deleted conversation back', undo));
  }
  const failed = (error) => status(error.message);

  function nameOf(conversation) {
    const first = oneLine(conversation.turns[0].user);
    return first.length > 60 ? `${first.slice(0, 59)}\u2026` : first;
  }

  function chosen(record) {
    const id = record.id;
    known.set(id, {id, version: record.version, name: record.name, said: said(record)});
    return JSON.stringify({conversation: {...record.conversation, id}, settings: record.settings});
  }
  const said = ({conversation, settings}) => JSON.stringify([conversation.turns, conversation.dropped, settings]);

  // --- what the page's server tells: keep this ---

  async function keep(text) {
    if (!text) return;
    const {conversation, settings} = JSON.parse(text);
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
    const number = conversation.id;
    const now = known.get(number) || {id: number, version: 0, name: '', said: ''};
    known.set(number, now);
    sessionStorage.setItem(OPEN, JSON.stringify({id: now.id, settings}));
    current = now.id;
    const news = said({conversation, settings});
    if (news !== now.said) {
      if (!conversation.turns.length) {
        if (now.version) await keeper.remove(now.id);  // cleared; it may come back
        now.version = 0;
      } else {
        now.name = now.name || nameOf(conversation);
        const record = () => ({...now, said: undefined, conversation: {...conversation, id: now.id}, settings});
        let version = await keeper.write(record());
        if (version === null) {
          Object.assign(now, {id: fresh(), version: 0});
          version = await keeper.write(record());
          status('Another tab has changed this conversation: what is said here is kept as a new one.');
        }
        now.version = version;
      }
      now.said = news;
      sessionStorage.setItem(OPEN, JSON.stringify({id: now.id, settings}));
      current = now.id;
    }
    await show();
  }

  // --- the list ---

  function pressed(label, title, action) {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = label;
    button.title = title;
    button.addEventListener('click', action);
    return button;
  }

  function entry(record) {
    const item = document.createElement('li');
    const open = pressed(record.name, record.name, () => choose(record.id));
    open.className = 'name';
    if (record.id === current) open.setAttribute('aria-current', 'true');
    const rename = pressed('Rename', `Rename ${record.name}`, () => renaming(item, record));
    const remove = pressed('Delete', `Delete ${record.name}`, () => removal(record).catch(failed));
    for (const button of [rename, remove]) button.setAttribute('aria-label', button.title);
    const more = document.createElement('span');
    more.className = 'more';
    more.append(rename, remove);
    item.append(open, more);
    return item;
  }

  async function show() {
    const list = part('ul');
    if (!list || list.querySelector('input')) return;  // a name is being typed
    const words = part('input[type=search]').value;
    const records = await keeper.search(words);
    list.replaceChildren(...records.map(entry));
    list.dataset.note = records.length ? '' : words.trim() ? 'Nothing holds these words' : 'None yet';
  }

  async function choose(id) {
    try {
      const record = await keeper.read(id);
      if (!record) { status('This conversation was deleted elsewhere.'); await show(); return; }
      status('');
      tell({act: 'open', record: chosen(record)});
    } catch (error) { failed(error); }
  }

  function renaming(item, record) {
    const input = document.createElement('input');
    input.value = record.name;
    input.maxLength = 200;
    input.setAttribute('aria-label', 'Name of the conversation');
    let over = false;
    const end = async (save) => {
      if (over) return;
      over = true;
      const name = oneLine(input.value);
      input.remove();
      try {
        if (save && name && name !== record.name) await rename(record.id, name);
      } catch (error) { failed(error); }
      await show();
    };
    input.addEventListener('keydown', (event) => {
      event.stopPropagation();
      if (event.key === 'Enter') end(true);
      if (event.key === 'Escape') end(false);
    });
    input.addEventListener('blur', () => end(true));
    item.replaceChildren(input);
    input.focus();
    input.select();
  }

  async function rename(id, name) {
    const whole = await keeper.read(id);
    if (!whole) return;
    const version = await keeper.write({...whole, name});
    if (version === null) { status('Another tab was faster: try again.'); return; }
    for (const one of known.values()) if (one.id === id) Object.assign(one, {name, version});
  }

  async function removal(record) {
    removed = await keeper.read(record.id);
    await keeper.remove(record.id);
    const mine = [...known.values()].find((one) => one.id === record.id);
    if (mine) Object.assign(mine, {version: 0, said: ''});
    status(`Deleted: ${record.name}.`, () => bringBack().catch(failed));
    if (record.id === current) tell({act: 'new'});
    await show();
  }

  async function bringBack() {
    if (!removed) return;
    const version = await keeper.write({...removed, version: 0});
    if (version !== null) {
      const record = {...removed, version};
      removed = null;
      status('');
      tell({act: 'open', record: chosen(record)});
    }
    await show();
  }

  // --- the page ---

  const later = (work) => { queue = queue.then(work).catch(failed); return queue; };

  window.almostShelf = {
    /** What this tab had open, as JSON for the page's server; '' in a new tab. */
    async load() {
      try {
        const before = JSON.parse(sessionStorage.getItem(OPEN) || 'null');
        const record = before && await keeper.read(before.id);
        if (record) return chosen(record);
        const settings = before ? before.settings : JSON.parse(localStorage.getItem(SETTINGS) || 'null');
        return settings ? JSON.stringify({settings}) : '';
      } catch (error) { failed(error); return ''; }
    },
    keep(text) { later(() => keep(text)); },
    mount(element, trigger) {
      root = element;
      tell = trigger;
      part('[data-shelf=new]').addEventListener('click', () => tell({act: 'new'}));
      part('input[type=search]').addEventListener('input', () => later(show));
      if (window.innerWidth <= 720) part('details').open = false;
      later(show);
      window.addEventListener('storage', (event) => { if (!event.key || event.key.startsWith(KEY)) later(show); });
      window.addEventListener('focus', () => { if (keeper === onServer) later(show); });
    },
  };
})();
