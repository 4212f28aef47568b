// The page's own script: theme, copying, downloading, keys, and keeping the newest text in view.
// What models and visitors wrote is only ever read as text here.
(() => {
  const KEY = 'almost-theme';

  function setDark(dark) {
    document.body.classList.toggle('dark', dark);
    const button = document.getElementById('theme');
    if (button) button.textContent = dark ? 'Light' : 'Dark';
  }

  function copy(text, button) {
    const done = () => {
      if (!button) return;
      const label = button.textContent;
      button.textContent = 'Copied';
      setTimeout(() => { button.textContent = label; }, 1200);
    };
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text).then(done, () => {});
    const area = document.createElement('textarea');  // a page that is not served over https has no clipboard
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
    done();
  }

  window.almostChat = {
    copy(text) { copy(text, document.querySelector('#copy-all')); },
    download(text) {
      if (!text) return;
      const link = document.createElement('a');
      link.href = URL.createObjectURL(new Blob([text], {type: 'application/jsonl'}));
      link.download = 'conversation.jsonl';
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    },
  };

  document.addEventListener('click', (event) => {
    const button = event.target.closest('button');
    if (!button) return;
    if (button.id === 'theme') {
      const dark = !document.body.classList.contains('dark');
      localStorage.setItem(KEY, dark ? 'dark' : 'light');
      setDark(dark);
    } else if (button.dataset.copy !== undefined) {
      copy(button.dataset.copy, button);
    } else if (button.dataset.copyCode !== undefined) {
      copy(button.closest('.code').querySelector('code').textContent, button);
    }
  });

  document.addEventListener('keydown', (event) => {
    if (event.key !== 'Escape') return;
    for (const id of ['cancel-edit', 'stop', 'compare-stop', 'arena-stop']) {
      const button = document.getElementById(id);
      if (button && button.offsetParent) { button.click(); return; }
    }
  });

  // gradio renders after this runs: wait for what is needed.
  let transcript = null;
  let pinned = true;
  let themed = false;
  new MutationObserver(() => {
    if (!themed && document.getElementById('theme')) {
      const chosen = localStorage.getItem(KEY);
      setDark(chosen ? chosen === 'dark' : document.body.classList.contains('dark'));
      themed = true;
    }
    if (!transcript) {
      transcript = document.getElementById('transcript');
      if (transcript) {
        transcript.tabIndex = 0;  // scrolled with the arrow keys
        transcript.setAttribute('role', 'log');
        transcript.setAttribute('aria-label', 'Conversation');
        transcript.addEventListener('scroll', () => {
          pinned = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 80;
        });
      }
    }
    if (transcript && pinned) transcript.scrollTop = transcript.scrollHeight;
  }).observe(document.documentElement, {childList: true, subtree: true, characterData: true});
})();
