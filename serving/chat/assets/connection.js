// When the page's server goes away, gradio's page stays as it was: Stop instead of Send, for good, also when the server
// is back, which knows nothing of this page any more. So the page loads itself anew then. What was said is kept
// (shelf.js), and what was being typed too.
(() => {
  const EVERY_MS = 3000;
  const DRAFT = 'almost-chat-draft';
  let text = '';  // of the answer that is being written, at the last look
  let idle = 0;  // looks since it grew
  let gone = false;
  let back = 0;  // looks since the server answers again
  let banner = null;
  const box = () => document.querySelector('#message textarea');

  function say(sentence) {
    if (!sentence) {
      if (banner) banner.remove();
      banner = null;
      return;
    }
    if (!banner) {
      banner = document.createElement('div');
      banner.className = 'lost notice';
      banner.setAttribute('role', 'alert');
      document.body.append(banner);
    }
    banner.textContent = sentence;
  }

  async function answers() {
    try {
      const options = {cache: 'no-store', signal: AbortSignal.timeout(5000)};
      return (await fetch(new URL('robots.txt', document.baseURI), options)).status < 500;
    } catch (error) { return false; }
  }

  async function look() {
    const live = document.querySelector('#live .live');
    const now = live ? live.textContent : '';
    idle = now && now === text ? idle + 1 : 0;
    text = now;
    const told = [...document.querySelectorAll('.toast-body')].some((one) => /connection.*lost/i.test(one.textContent));
    if (!gone && !told && idle < 2) return;
    if (!(await answers())) {
      gone = true;
      back = 0;
      say('The server of this page does not answer. The page loads anew as soon as it does; what was said is kept.');
    } else if ((gone || told) && now && !idle) {  // the answer goes on after all
      gone = false;
      say('');
    } else if (gone || told) {
      back += 1;
      if (back < 2) return;
      if (box() && box().value) sessionStorage.setItem(DRAFT, box().value);
      location.reload();
    }
  }

  function restore() {
    const draft = sessionStorage.getItem(DRAFT);
    if (!draft || !box()) return;
    sessionStorage.removeItem(DRAFT);
    box().value = draft;
    box().dispatchEvent(new Event('input', {bubbles: true}));
  }

  const again = async () => {
    await look();
    restore();
    setTimeout(again, EVERY_MS);
  };
  setTimeout(again, EVERY_MS);
})();
