"use strict";
// The page reads without this script; it adds the theme switch, copying, and the sample browser.
// What comes from a run reaches the document as text nodes and attribute values only, never as markup.

const $ = (id) => document.getElementById(id);

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// --- theme and copying

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
}

async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "offscreen" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const said = button.textContent;
  button.textContent = "copied";
  setTimeout(() => { button.textContent = said; }, 1200);
}

const copyButton = (text) => h("button", { type: "button", class: "copy", onclick: (e) => copy(e.target, text()) }, "copy");

// --- data

async function unpack(number) { // each blob once: base64 of gzip of JSON
  const element = $(`blob-${number}`);
  try {
    const binary = atob(element.textContent.trim());
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    element.remove(); // the packed form is not needed any more
    return await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  } catch {
    throw new Error("the data in this page are damaged");
  }
}

function load(benchmark, number) { // a chunk is unpacked when one of its samples is first looked at, or searched
  const chunk = benchmark.chunks[number];
  chunk.loading ||= Promise.all([chunk.texts, chunk.outputs].map((blobs) => Promise.all(blobs.map(unpack))))
    .then(([texts, outputs]) => { chunk.data = { texts, outputs }; });
  return chunk.loading;
}

// True where these samples are unpacked. Where not, they are unpacked now, and `again` is called afterwards.
function ready(benchmark, places, again) {
  const numbers = new Set(places.map((at) => chunkOf(benchmark, at)));
  const packed = [...numbers].filter((number) => !benchmark.chunks[number].data);
  if (packed.length) Promise.all(packed.map((number) => load(benchmark, number))).then(again).catch(complain);
  return !packed.length;
}

function complain(error) {
  $("broken").hidden = false;
  $("broken").textContent = `The samples cannot be shown: ${error.message}. samples.jsonl of the run folder has them.`;
}

// Choices that a prompt ends in do not travel a second time; `samples.py` has the same expression.
const LETTERED = /\nA\. ([\s\S]*?)\nB\. ([\s\S]*?)\nC\. ([\s\S]*?)\nD\. ([\s\S]*?)\n[^\n]*$/;

const chunkOf = (benchmark, at) => benchmark.chunks.findIndex((chunk) => at < chunk.end);
const startOf = (benchmark, chunk) => (chunk ? benchmark.chunks[chunk - 1].end : 0);

function sampleAt(benchmark, at) { // its chunk must be unpacked: see `ready`
  const number = chunkOf(benchmark, at), place = at - startOf(benchmark, number);
  const { texts: packed, outputs } = benchmark.chunks[number].data;
  const texts = packed.map((data) => {
    const [choices, prompts, snippet, judged] = data.samples[place];
    const whole = prompts.map(([piece, own, ending]) => (
      { shared: piece < 0 ? "" : data.pieces[piece], own, continuations: data.endings[ending] }));
    return { choices: choices || LETTERED.exec(whole[0].own).slice(1), prompts: whole, snippet, judged };
  });
  return { texts, outputs: outputs.map((lines) => lines[place]) };
}

// --- what a score says

const MARKS = { right: "●", wrong: "○", tied: "◐", none: "×" };
const WORDS = { right: "right", wrong: "wrong", tied: "even", none: "unscored" };
const JUDGED = { ...WORDS, right: "won", wrong: "lost" };
const GRADED = { ...WORDS, right: "upper half", wrong: "lower half", tied: "middle" }; // marks from 1 to 10
const wordsOf = (b) => (b.graded ? GRADED : b.judged ? JUDGED : WORDS);
const wordOf = (b, score) => wordsOf(b)[verdict(b, score)];

function verdict(b, score) {
  const middle = b.graded ? 5.5 : 0.5;
  if (score === null) return "none";
  return score > middle ? "right" : score < middle ? "wrong" : "tied";
}

const wanted = {
  all: () => true,
  wrong: (b, r, at) => verdict(b, b.score[r][at]) === "wrong",
  tied: (b, r, at) => verdict(b, b.score[r][at]) === "tied",
  unscored: (b, r, at) => b.score[r][at] === null,
  truncated: (b, r, at) => b.cut[r][at] > 0 || b.reasons[b.reason[r][at]] === "context_too_long",
};

function flipped(b, at) { // as `almost-eval compare` counts: right (above one half) in one, not in another
  const scored = b.score.map((of) => of[at]).filter((score) => score !== null);
  return scored.some((score) => score > 0.5) && scored.some((score) => score <= 0.5);
}

// --- the browser

const ROW = 44, SPARE = 8;
let benchmarks = [], shown = [], selected = -1, search = 0;
const state = { benchmark: 0, filter: "all", run: -1, group: "", query: "" };
const current = () => benchmarks[state.benchmark];

function passes(b, filter, at) {
  if (state.group !== "" && b.group[at] !== Number(state.group)) return false;
  if (filter === "flipped") return flipped(b, at);
  return state.run >= 0 ? wanted[filter](b, state.run, at) : b.runs.some((_, r) => wanted[filter](b, r, at));
}

function haystack(b, number) {
  const chunk = b.chunks[number];
  if (!chunk.lower) {
    chunk.lower = [];
    for (let at = startOf(b, number); at < chunk.end; at++) {
      const { texts, outputs } = sampleAt(b, at);
      const parts = [b.ids[at], b.groups[b.group[at]]];
      for (const { choices, prompts, snippet, judged } of texts) {
        parts.push(snippet || "", ...choices, ...prompts.map((prompt) => prompt.own));
        if (judged) parts.push(judged.question || "", ...judged.answers.map(([name, text]) => `${name} ${text || ""}`));
      }
      for (const output of outputs) if (output) parts.push(output.review || "", ...(output.completions || []));
      chunk.lower.push(parts.join("\n").toLowerCase());
    }
  }
  return chunk.lower;
}

const find = () => filterAndSearch().catch(complain);

async function filterAndSearch() {
  const mine = ++search, b = current(), query = state.query.trim().toLowerCase();
  const kept = [];
  counts();
  for (let number = 0; number < b.chunks.length; number++) {
    const start = startOf(b, number);
    if (query) {
      await load(b, number);
      if (mine !== search) return;
    }
    const lower = query ? haystack(b, number) : null;
    for (let at = start; at < b.chunks[number].end; at++) {
      if (passes(b, state.filter, at) && (!query || lower[at - start].includes(query))) kept.push(at);
    }
    if (query) { // a long search shows what it has, and yields to the next key
      shown = kept;
      say(`searching, ${kept.length.toLocaleString("en")} found so far`);
      draw();
      await new Promise((resolve) => setTimeout(resolve));
      if (mine !== search) return;
    }
  }
  shown = kept;
  const of = b.ids.length.toLocaleString("en");
  say(`${kept.length.toLocaleString("en")} of ${of} samples`);
  $("list").scrollTop = 0;
  if (!kept.includes(selected)) select(kept.length ? kept[0] : -1, { quiet: true });
  draw();
}

const say = (text) => { $("status").textContent = text; };

function counts() {
  const b = current();
  for (const button of document.querySelectorAll("#filters button")) {
    const filter = button.dataset.filter;
    let n = 0;
    for (let at = 0; at < b.ids.length; at++) n += passes(b, filter, at);
    button.querySelector("span").textContent = n.toLocaleString("en");
    if (filter === "wrong") button.firstChild.textContent = `${b.judged ? wordsOf(b).wrong : filter} `;
    button.setAttribute("aria-pressed", filter === state.filter);
    button.hidden = filter === "flipped" && b.runs.length < 2;
  }
}

const oneLine = (text) => text.replace(/\s+/g, " ").trim();

function snippet(b, at) {
  const { snippet, prompts, judged } = sampleAt(b, at).texts[0];
  const text = snippet || (judged && judged.question) || (prompts.length ? prompts[0].own || prompts[0].shared : "");
  return oneLine(text.slice(0, 400)).slice(0, 160);
}

function draw() {
  const b = current(), list = $("list"), rows = $("rows");
  rows.style.height = `${shown.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
  if (!ready(b, shown.slice(first, last), draw)) return;
  const made = [];
  for (let place = first; place < last; place++) {
    const at = shown[place];
    const marks = b.runs.map((run, r) => {
      const score = b.score[r][at], title = `${run.label}: ${wordOf(b, score)}`;
      return h("span", { class: `mark s${run.series % 8}`, title }, MARKS[verdict(b, score)]);
    });
    const row = h("div", {
      class: "row", role: "option", id: `row-${at}`, "aria-selected": String(at === selected),
      "aria-setsize": shown.length, "aria-posinset": place + 1, onclick: () => select(at, { scroll: true }),
    }, h("span", { class: "marks" }, marks), h("span", { class: "id" }, b.ids[at]),
    h("span", { class: "snippet" }, snippet(b, at)));
    row.style.top = `${place * ROW}px`;
    made.push(row);
  }
  rows.replaceChildren(...made);
  if ($(`row-${selected}`)) list.setAttribute("aria-activedescendant", `row-${selected}`);
  else list.removeAttribute("aria-activedescendant");
}

function select(at, { scroll = false, quiet = false } = {}) {
  selected = at;
  const b = current();
  const again = () => { if (b === current() && at === selected) select(at, { scroll, quiet }); };
  if (at >= 0 && !ready(b, [at], again)) return;
  $("detail").replaceChildren(...(at < 0 ? [h("p", { class: "quiet" }, "No sample matches.")] : detail(b, at)));
  $("detail").scrollTop = 0;
  if (!quiet && at >= 0) history.replaceState(null, "", `#sample=${state.benchmark}/${encodeURIComponent(b.ids[at])}`);
  draw();
  if (scroll && matchMedia("(max-width: 60rem)").matches) $("detail").scrollIntoView({ block: "start" });
}

function move(by) {
  if (!shown.length) return;
  const place = Math.min(shown.length - 1, Math.max(0, Math.max(0, shown.indexOf(selected)) + by));
  const list = $("list"), top = place * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  select(shown[place]);
}

// --- one sample

const fixed = (value) => (typeof value === "number" ? value.toFixed(3).replace("-", "−") : "not finite");

function detail(b, at) {
  const { texts, outputs } = sampleAt(b, at);
  const parts = [
    h("header", {}, h("h3", {}, b.ids[at]), h("p", { class: "quiet" }, b.groups[b.group[at]].replace(/_+/g, " "))),
    h("ul", { class: "verdicts" }, b.runs.map((run, r) => verdictLine(b, run, r, at, outputs[r]))),
  ];
  for (const panel of b.panels[b.panel[at]]) parts.push(panelOf(b, panel, texts, outputs));
  b.runs.forEach((run, r) => parts.push(...writtenBy(b, run, texts[b.source[r]], outputs[r])));
  texts.forEach((text, source) => parts.push(...promptsOf(b, text, source)));
  return parts.filter(Boolean);
}

function verdictLine(b, run, r, at, output) {
  const score = b.score[r][at], reason = b.reasons[b.reason[r][at]];
  const facts = [];
  if (score !== null && score !== 0 && score !== 1) facts.push(`score ${score}`);
  if (reason) facts.push(reason.replace(/_/g, " "));
  if (b.cut[r][at]) facts.push(`${b.cut[r][at]} tokens left out`);
  for (const [name, value] of Object.entries((output && output.metrics) || {})) {
    facts.push(`${name} ${value === null ? "unscored" : value}`);
  }
  return h("li", {}, h("span", { class: `mark s${run.series % 8}` }, MARKS[verdict(b, score)]), h("b", {}, run.label), ` ${wordOf(b, score)}`,
    facts.length ? h("span", { class: "quiet" }, ` · ${facts.join(" · ")}`) : null);
}

function panelOf(b, panel, texts, outputs) {
  const values = outputs.map((output) => panel.rows.map(([request, column]) => {
    if (!output) return undefined;
    return panel.unit === "reward" ? (output.rewards || [])[column] : ((output.loglikelihoods || [])[request] || [])[column];
  }));
  if (values.every((of) => of.every((value) => value === undefined))) return null;
  const best = values.map((of) => Math.max(...of.filter((value) => typeof value === "number")));
  const rows = panel.rows.map(([request, column, choice, good], place) => {
    const { choices, prompts } = texts[0];
    const continuation = prompts[request] && prompts[request].continuations[column];
    const name = [];
    if (continuation !== undefined && (choice < 0 || continuation.length <= 4)) name.push(h("code", {}, JSON.stringify(continuation)));
    if (choice >= 0) name.push(` ${choices[choice] === undefined ? `choice ${choice + 1}` : choices[choice].trim()}`);
    if (good === 1) name.push(h("span", { class: "gold" }, "gold"));
    return h("div", { class: `choice${good === 1 ? " is-gold" : ""}` }, h("div", { class: "name" }, name),
      b.runs.map((run, r) => bar(run, values[r][place], best[r])));
  });
  const unit = panel.unit === "reward" ? "reward, raw; bar: relative to the larger" : "log p, nats; bar: p relative to the largest";
  return h("section", { class: "panel" }, h("h4", {}, panel.title, h("small", {}, ` ${unit}`)), rows);
}

function bar(run, value, best) {
  if (value === undefined) return h("div", { class: "bar" });
  const fill = h("i", { class: `s${run.series % 8}` });
  fill.style.width = `${typeof value === "number" ? Math.max(0.5, 100 * Math.exp(value - best)) : 0}%`;
  return h("div", { class: "bar", title: run.label }, h("span", { class: "track" }, fill), h("output", {}, fixed(value)));
}

const KNOWN = new Set(["loglikelihoods", "rewards", "completions", "finish_reasons", "metrics", "review", "winner", "scores", "score", "lengths",
  "reasoning", "thought_cut", "thinking"]);

function thoughtOf(thought, isCut) { // folded: it is no part of what was scored
  if (!thought && !isCut) return null;
  const note = `${thought.length.toLocaleString("en")} characters${isCut ? ", cut before an answer" : ""}`;
  return h("details", { class: "thought" }, h("summary", {}, "Thought", h("small", {}, ` ${note}`)), h("pre", {}, thought));
}

function writtenBy(b, run, text, output) { // texts: completions, or two answers and their review
  const parts = [], whose = b.runs.length > 1 ? ` · ${run.label}` : "";
  if (!output) return parts;
  (output.completions || []).forEach((completion, i) => {
    parts.push(h("h4", {}, `Answer${whose}`, h("small", {}, ` ${(output.finish_reasons || [])[i] || ""}`)),
      thoughtOf((output.reasoning || [])[i] || "", (output.thought_cut || [])[i]), h("pre", {}, completion));
  });
  if (text.judged) {
    const { question, answers } = text.judged;
    if (question !== null) parts.push(h("h4", {}, `Question${whose}`), h("pre", {}, question));
    const sides = answers.map(([name, answer, thought], side) => {
      const facts = [];
      if (b.graded && typeof output.score === "number") facts.push(`${output.score} of 10`);
      if (output.scores) facts.push(`score ${output.scores[side]}`);
      if (output.rewards) facts.push(`reward ${fixed(output.rewards[side])}`);
      if (output.lengths) facts.push(`${output.lengths[side].toLocaleString("en")} characters`);
      if (output.winner === String(side + 1)) facts.push("preferred");
      return h("div", {}, h("h4", {}, `${side + 1} · ${name}`, h("small", {}, ` ${facts.join(", ")}`)),
        thoughtOf(thought || ""), h("pre", {}, answer === null ? "(not in the run folder)" : answer));
    });
    parts.push(h("div", { class: "sides" }, sides));
    if (output.review) {
      parts.push(h("h4", {}, `Review${whose}`), thoughtOf(output.thinking || ""), h("pre", { class: "review" }, output.review));
    }
  }
  const rest = Object.entries(output).filter(([key, value]) => !KNOWN.has(key) && value !== null);
  if (rest.length) {
    parts.push(h("dl", { class: "rest" }, rest.flatMap(([key, value]) => [
      h("dt", {}, key.replace(/_/g, " ") + whose),
      h("dd", {}, typeof value === "string" ? value : JSON.stringify(value)),
    ])));
  }
  return parts;
}

function promptsOf(b, text, source) {
  const readers = b.runs.filter((_, r) => b.source[r] === source).map((run) => run.label);
  const whose = b.chunks[0].texts.length > 1 ? ` · ${readers.join(", ")}` : "";
  if (!text.prompts.length) {
    const why = b.has_prompts ? "Nothing was asked: the prompt did not fit the context." :
      "The run folder holds no prompt text. Repeat the command of the run: what is scored stays, and the prompts are written.";
    return text.judged ? [] : [h("p", { class: "quiet" }, why)];
  }
  return text.prompts.map(({ shared, own, continuations }, i) => {
    const n = text.prompts.length > 1 ? ` ${i + 1} of ${text.prompts.length}` : "";
    const body = [];
    if (shared) {
      const size = shared.length.toLocaleString("en");
      body.push(h("details", { class: "shared" },
        h("summary", {}, `begins with ${size} characters that neighbouring prompts share`), h("pre", {}, shared)));
    }
    body.push(h("pre", { class: "prompt" }, own));
    if (continuations.length) {
      body.push(h("p", { class: "quiet" }, "scored after it: ", continuations.flatMap((c) => [h("code", {}, JSON.stringify(c)), " "])));
    }
    return h("details", { class: "asked", open: i === 0 },
      h("summary", {}, `Prompt${n}${whose}`), copyButton(() => shared + own), body);
  });
}

// --- start

async function setUp() {
  const index = await unpack(document.querySelectorAll("script.blob").length - 1); // the last blob
  benchmarks = index.benchmarks;
  const choose = $("benchmark");
  choose.append(...benchmarks.map((b, i) => h("option", { value: i }, b.title)));
  choose.parentElement.hidden = benchmarks.length < 2;
  choose.addEventListener("change", () => { open(Number(choose.value)); find(); });
  $("run").addEventListener("change", (e) => { state.run = Number(e.target.value); find(); });
  $("group").addEventListener("change", (e) => { state.group = e.target.value; find(); });
  for (const button of document.querySelectorAll("#filters button")) {
    button.addEventListener("click", () => { state.filter = button.dataset.filter; find(); });
  }
  let waiting;
  $("query").addEventListener("input", (e) => {
    state.query = e.target.value;
    clearTimeout(waiting);
    waiting = setTimeout(find, 120);
  });
  $("query").addEventListener("keydown", (e) => {
    if (e.key === "ArrowDown" || e.key === "Enter") { e.preventDefault(); $("list").focus(); }
    if (e.key === "Escape") { e.target.value = state.query = ""; find(); }
  });
  const list = $("list");
  list.addEventListener("scroll", draw, { passive: true });
  addEventListener("resize", draw);
  const keys = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  list.addEventListener("keydown", (e) => {
    if (e.key in keys && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); move(keys[e.key]); }
    if (e.key === "Enter") $("detail").focus();
  });
  $("detail").addEventListener("keydown", (e) => { if (e.key === "Escape") list.focus(); });
  document.addEventListener("keydown", (e) => {
    const typing = e.target.closest && e.target.closest("input, select, textarea");
    if (e.key === "/" && !typing && !e.ctrlKey && !e.metaKey) { e.preventDefault(); $("query").focus(); }
  });
  $("browser").hidden = false;
  const linked = /^#sample=(\d+)\/(.+)$/.exec(location.hash);
  const place = linked && benchmarks[linked[1]] ? Number(linked[1]) : 0;
  open(place);
  if (linked) selected = benchmarks[place].ids.findIndex((id) => encodeURIComponent(id) === linked[2]);
  if (selected >= 0) select(selected, { quiet: true });
  find();
  if (linked && selected >= 0) { move(0); $("samples").scrollIntoView(); }
}

function open(number) {
  Object.assign(state, { benchmark: number, run: -1, group: "", filter: "all" });
  selected = -1;
  const b = current(), choice = (values, all) => [h("option", { value: all[0] }, all[1]),
    ...values.map(([value, name]) => h("option", { value }, name))];
  $("benchmark").value = number;
  $("run").replaceChildren(...choice(b.runs.map((run, r) => [r, run.label]), [-1, "any model"]));
  $("run").parentElement.hidden = b.runs.length < 2;
  const groups = b.groups.map((name, g) => [g, (name || "none").replace(/_+/g, " ")]);
  $("group").replaceChildren(...choice(groups, ["", "all groups"]));
  $("group").parentElement.hidden = b.groups.length < 2;
}

$("theme").addEventListener("click", switchTheme);
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", () => copy(button, $(button.dataset.copy).textContent));
}
if ($("browser") && typeof DecompressionStream === "undefined") {
  $("broken").hidden = false;
  $("broken").textContent = "This browser is too old to unpack the samples (it has no DecompressionStream): use a newer one.";
} else if ($("browser")) setUp().catch(complain);
