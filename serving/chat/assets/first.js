// The first tab asks its prepared question by itself; the open tab is in the address; keys of the arena.
(() => {
  const TABS = ['start', 'chat', 'compare', 'arena', 'report'];
  const KEYS = {n: 'arena-next', a: 'vote-a', b: 'vote-b', t: 'vote-tie', x: 'vote-both_bad'};
  const visible = (element) => element && element.offsetParent !== null;
  const press = (id) => {
    const button = document.getElementById(id);
    if (visible(button) && !button.disabled) button.click();
  };

  // --- the tab in the address: a reload, and a link, open it again ---
  let opened = false;
  const tabButton = (name) => [...document.querySelectorAll(`#tab-${name}-button`)].find(visible);
  function openTab() {
    const name = location.hash.slice(1);
    if (!TABS.includes(name)) { opened = true; return; }
    const button = tabButton(name);
    if (!button) return;
    opened = true;
    if (button.getAttribute('aria-selected') !== 'true') button.click();
  }
  document.addEventListener('click', (event) => {
    const button = event.target.closest('button[role=tab]');
    const name = button && TABS.find((one) => button.id === `tab-${one}-button`);
    if (name) history.replaceState(null, '', `#${name}`);
  });

  // --- the prepared question, once for each opening of the page on its first tab ---
  let started = false;
  function start() {
    const send = document.getElementById('first-send');
    const box = document.querySelector('#first-message textarea');
    if (!visible(send) || !box || !box.value) return;
    started = true;
    if (!location.hash || location.hash === '#start') send.click();
  }

  // gradio renders after this runs, and a text box's value is no change of the document: look until all is there.
  const timer = setInterval(() => {
    if (!opened) openTab();
    if (!started) start();
    if (opened && started) clearInterval(timer);
  }, 50);
  setTimeout(() => clearInterval(timer), 20000);

  // --- keys ---
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') { press('first-stop'); press('arena-stop'); return; }
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target.closest('input, textarea, select, [contenteditable]')) return;
    const id = KEYS[event.key.toLowerCase()];
    if (id && visible(document.getElementById('arena-next') || document.getElementById('vote-a'))) press(id);
  });
})();
