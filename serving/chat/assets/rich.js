// Code in colours with a button to copy it, formulas set, tables that scroll. Works on what render.py wrote, in place.
// Only text is read, and only text is written, but for what KaTeX makes of a formula (trust: false, so no links).
(() => {
  const MOST = 20000;  // characters of code that are coloured
  const NEEDS = {cpp: ['c'], php: ['markup-templating']};
  const ALIASES = {
    'c++': 'cpp', js: 'javascript', mjs: 'javascript', jsx: 'javascript', node: 'javascript', ts: 'typescript',
    tsx: 'typescript', py: 'python', python3: 'python', sh: 'bash', shell: 'bash', zsh: 'bash', console: 'bash',
    yml: 'yaml', rs: 'rust', golang: 'go', tex: 'latex', html: 'markup', xml: 'markup', svg: 'markup', jsonl: 'json',
  };
  const parts = window.almostParts || {};
  const loads = new Map();
  const address = (name) => new URL(`assets/${parts[name]}`, document.baseURI).href;

  function once(name, load) {
    if (!loads.has(name)) loads.set(name, load().catch((error) => { console.info(`${name}: ${error}`); return null; }));
    return loads.get(name);
  }

  // --- maths ---

  const katex = () => once('katex', async () => {
    if (!parts['katex.js'] || !parts['katex.css']) return null;
    const sheet = document.createElement('link');
    sheet.rel = 'stylesheet';
    sheet.href = address('katex.css');
    const styled = new Promise((done) => { sheet.onload = sheet.onerror = done; });
    document.head.append(sheet);
    const [module] = await Promise.all([import(address('katex.js')), styled]);
    return module.default;
  });

  function set(element, engine) {
    const source = element.textContent;
    element.dataset.rich = 'done';
    const box = document.createElement('span');
    const displayMode = element.classList.contains('display');
    box.className = displayMode ? 'formula display' : 'formula';
    if (displayMode) box.tabIndex = 0;  // a wide one is scrolled with the arrow keys
    try {
      engine.render(source, box, {displayMode, throwOnError: true, trust: false, strict: 'ignore', maxSize: 20});
      element.replaceWith(box);
    } catch (error) {
      element.title = String(error.message || error).slice(0, 300);  // no formula: its source stays
    }
  }

  // --- code ---

  const grammar = async (language) => {
    const core = await once('prism', async () => {
      if (!parts['prism.js']) return null;
      window.Prism = {...window.Prism, manual: true};  // or it would colour the page by itself
      const module = await import(address('prism.js'));
      const made = Object.values(module)[0]();
      window.Prism = made.default || made;
      return window.Prism;
    });
    if (!core) return null;
    for (const name of [...(NEEDS[language] || []), language]) {
      const file = `prism-${name}.js`;
      if (!core.languages[name] && parts[file]) await once(file, async () => import(address(file)));
    }
    return Object.hasOwn(core.languages, language) ? core.languages[language] : null;
  };

  function coloured(tokens) {
    const out = document.createDocumentFragment();
    for (const token of tokens) {
      if (typeof token === 'string') {
        out.append(token);
        continue;
      }
      const span = document.createElement('span');
      span.className = `token ${token.type}`;
      span.append(typeof token.content === 'string' ? token.content : coloured([token.content].flat()));
      out.append(span);
    }
    return out;
  }

  function colour(code, rules) {
    const text = code.textContent;
    code.dataset.rich = 'done';
    if (text.length <= MOST) code.replaceChildren(coloured(window.Prism.tokenize(text, rules)));
  }

  function frame(code) {
    const block = code.parentElement;
    const name = [...code.classList].find((one) => one.startsWith('language-')) || '';
    const head = document.createElement('div');
    head.className = 'code-head';
    const label = document.createElement('span');
    label.textContent = name.slice('language-'.length, 40) || 'text';
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = 'Copy';
    button.dataset.copyCode = '';
    button.setAttribute('aria-label', 'Copy this code');
    head.append(label, button);
    const outer = document.createElement('div');
    outer.className = 'code';
    block.replaceWith(outer);
    outer.append(head, block);
    block.tabIndex = 0;
    code.dataset.rich = 'framed';
    const language = name.slice('language-'.length).toLowerCase();
    const rules = grammar(ALIASES[language] || language);
    return language ? rules.then((found) => { if (found && code.isConnected) colour(code, found); }) : null;
  }

  // --- whatever is new below an element ---

  function enrich(root) {
    for (const code of root.querySelectorAll('.md pre > code:not([data-rich])')) frame(code);
    const formulas = [...root.querySelectorAll('.md code.maths:not([data-rich])')];
    if (formulas.length) {
      const ready = loads.get('katex-engine');
      if (ready) formulas.forEach((one) => set(one, ready));  // at once, so that nothing flickers while it grows
      else katex().then((engine) => {
        if (!engine) return;
        loads.set('katex-engine', engine);
        document.querySelectorAll('.md code.maths:not([data-rich])').forEach((one) => set(one, engine));
      });
    }
    for (const table of root.querySelectorAll('.md table:not([data-rich])')) {
      table.dataset.rich = 'done';
      const box = document.createElement('div');
      box.className = 'table';
      box.tabIndex = 0;
      box.setAttribute('role', 'region');
      box.setAttribute('aria-label', 'Table');
      table.replaceWith(box);
      box.append(table);
    }
  }

  window.almostRich = {enrich};
  new MutationObserver((changes) => {
    for (const change of changes) {
      if (change.addedNodes.length && change.target.isConnected) enrich(change.target);
    }
  }).observe(document.documentElement, {childList: true, subtree: true});
})();
