"use strict";
// One page, no request: data lies in <script> blocks as gzipped JSON and is unpacked when needed.
// Text of a corpus or a model only ever becomes a text node.

const about = JSON.parse(document.getElementById("about").textContent);
const cache = new Map();
const state = { view: "overview", d: 0, latent: null, query: "", sort: "density", up: false,
  least: 0, brush: null, words: [] };
const VIEWS = [["overview", "Overview"], ["latents", "Latents"]];
if (about.dictionaries.length > 1) VIEWS.push(["compare", "Side by side"]);
if (about.prompts.length) VIEWS.push(["prompts", "Prompts"]);
if (about.live && location.protocol === "http:") VIEWS.push(["live", "Live"]);
const MEASURES = { density: "density", mean: "mean activation", largest: "largest activation",
  nearest: "cosine of nearest latent", dimensions: "effective dimensions",
  likeness: "likeness of partner", number: "number" };
const CHUNK = 64, ROW = 30;

async function unpack(id) {
  if (!cache.has(id)) cache.set(id, (async () => {
    const text = atob(document.getElementById(id).textContent);
    const bytes = Uint8Array.from(text, c => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  })());
  return cache.get(id);
}

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter(c => c !== null && c !== undefined));
  return node;
}

const three = x => x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : String(+x.toPrecision(3));
const own = () => about.dictionaries[state.d];
const main = document.getElementById("main");

// --- where one is: the address names the view, the dictionary and the latent --------------------

function address(latent = state.latent, d = state.d) {
  return latent === null ? `#${state.view}/d${d}` : `#${state.view}/d${d}/L${latent}`;
}

function readAddress() {
  const words = decodeURIComponent(location.hash.slice(1)).split("/");
  for (const word of words) {
    if (VIEWS.some(([name]) => name === word)) state.view = word;
    else if (/^d\d+$/.test(word)) state.d = Math.min(+word.slice(1), about.dictionaries.length - 1);
    else if (/^L\d+$/.test(word)) {
      state.latent = Math.min(+word.slice(1), own().d_sae - 1);
      if (words.length === 1) state.view = "latents";
    }
  }
}

function go(change) {
  Object.assign(state, change);
  if (state.latent !== null && state.latent >= own().d_sae) state.latent = null;
  history.replaceState(null, "", address());
  draw();
}

async function draw() {
  document.getElementById("views").replaceChildren(...VIEWS.map(([name, title]) =>
    el("button", { type: "button", "aria-current": state.view === name,
      onclick: () => go({ view: name }) }, title)));
  const select = document.getElementById("dictionary");
  if (!select.options.length) about.dictionaries.forEach((one, i) =>
    select.append(el("option", { value: i }, one.name)));
  select.value = state.d;
  state.words = await unpack("words");
  const show = { overview, latents, compare: latents, prompts, live }[state.view];
  await show();
}

// --- overview ------------------------------------------------------------------------------------

async function overview() {
  const cards = about.dictionaries.map((one, i) => el("section", { class: "card" },
    el("h2", {}, one.name),
    el("dl", {}, ...one.facts.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, value)])),
    el("p", {}, el("button", { type: "button", onclick: () => go({ view: "latents", d: i }) },
      "its latents"))));
  const columns = await unpack(`table-${state.d}`);
  const names = Object.keys(MEASURES).filter(name => name in columns);
  const choice = (label, value, change) => el("label", { class: "field" }, label,
    el("select", { "aria-label": label, onchange: e => change(e.target.value) }, ...names.map(name =>
      el("option", { value: name, ...(name === value ? { selected: "" } : {}) }, MEASURES[name]))));
  state.x ??= "density"; state.y ??= "nearest";
  if (!names.includes(state.y)) state.y = "nearest";
  const canvas = el("canvas", { "aria-label": "all latents as points" });
  const note = el("p", { class: "soft", role: "status" },
    "Each point is a latent. Point at one to read its tokens, click to open it, drag to select.");
  main.replaceChildren(
    el("h1", {}, `What ${about.dictionaries.length > 1 ? "these dictionaries" : "this dictionary"} found`),
    el("p", { class: "soft" }, `Measured on the rows of a store of ${about.corpus}.`),
    el("div", { class: "cards" }, ...cards),
    el("h2", {}, `All latents of ${own().name}`),
    el("div", { class: "bar" }, choice("across", state.x, x => go({ x })),
      choice("up", state.y, y => go({ y }))), canvas, note);
  await scatter(canvas, note, columns);
}

async function scatter(canvas, note, columns) {
  const search = await unpack(`search-${state.d}`);
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = devicePixelRatio || 1;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const draw2d = canvas.getContext("2d");
  draw2d.scale(ratio, ratio);
  const style = getComputedStyle(document.documentElement);
  const axis = name => {
    const logs = ["density", "mean", "largest", "dimensions"].includes(name);
    const values = columns[name].map(v => logs ? (v > 0 ? Math.log10(v) : NaN) : v);
    const finite = values.filter(Number.isFinite);
    let low = Infinity, high = -Infinity;
    for (const v of finite) { if (v < low) low = v; if (v > high) high = v; }
    return { values, low, span: high - low || 1, logs };
  };
  const x = axis(state.x), y = axis(state.y);
  const left = 46, bottom = 26;
  const px = i => left + 8 + (x.values[i] - x.low) / x.span * (width - left - 20);
  const py = i => height - bottom - 8 - (y.values[i] - y.low) / y.span * (height - bottom - 20);
  const alive = columns.density.map((v, i) => i).filter(i => columns.density[i] > 0
    && Number.isFinite(px(i)) && Number.isFinite(py(i)));
  function paint(box) {
    draw2d.clearRect(0, 0, width, height);
    draw2d.fillStyle = style.getPropertyValue("--soft");
    draw2d.font = "11px system-ui";
    for (let t = 0; t <= 4; t++) {
      const show = (a, v) => three(a.logs ? 10 ** v : v);
      draw2d.fillText(show(x, x.low + x.span * t / 4), left + t / 4 * (width - left - 40), height - 8);
      draw2d.fillText(show(y, y.low + y.span * t / 4), 4,
        height - bottom - t / 4 * (height - bottom - 20));
    }
    draw2d.fillStyle = style.getPropertyValue("--point");
    for (const i of alive) { draw2d.beginPath(); draw2d.arc(px(i), py(i), 2, 0, 7); draw2d.fill(); }
    if (box) { draw2d.strokeStyle = style.getPropertyValue("--ink"); draw2d.strokeRect(...box); }
  }
  paint();
  const closest = e => {
    let best = null, least = 400;
    for (const i of alive) {
      const d = (px(i) - e.offsetX) ** 2 + (py(i) - e.offsetY) ** 2;
      if (d < least) { least = d; best = i; }
    }
    return best;
  };
  let from = null;
  canvas.onpointerdown = e => { from = [e.offsetX, e.offsetY]; };
  canvas.onpointermove = e => {
    if (from) return paint([from[0], from[1], e.offsetX - from[0], e.offsetY - from[1]]);
    const i = closest(e);
    if (i !== null) note.textContent = `latent ${i}: ${search[i]}`;
  };
  canvas.onpointerup = e => {
    if (!from) return;
    const [a, b] = [Math.min(from[0], e.offsetX), Math.max(from[0], e.offsetX)];
    const [c, d] = [Math.min(from[1], e.offsetY), Math.max(from[1], e.offsetY)];
    from = null;
    if (b - a < 5 && d - c < 5) {
      const i = closest(e);
      return i === null ? paint() : go({ view: "latents", latent: i });
    }
    const inside = new Set(alive.filter(i => px(i) >= a && px(i) <= b && py(i) >= c && py(i) <= d));
    go({ view: "latents", brush: { d: state.d, inside }, latent: null });
  };
}

// --- the list, alone or beside the partners of another dictionary ---------------------------------

async function latents() {
  const side = state.view === "compare";
  const columns = await unpack(`table-${state.d}`), search = await unpack(`search-${state.d}`);
  const other = own().partner;
  const theirs = side ? await unpack(`search-${other}`) : null;
  const names = Object.keys(MEASURES).filter(name => name in columns || name === "number");
  const lower = state.lower?.d === state.d ? state.lower.texts : search.map(t => t.toLowerCase());
  state.lower = { d: state.d, texts: lower };
  if (side !== (state.sortedFor === "compare")) {
    state.sortedFor = side ? "compare" : "latents";
    Object.assign(state, side ? { sort: "likeness", up: true, least: 1e-4 }
      : { sort: "density", up: false, least: 0 });
  }
  const order = find(columns, lower, state.sort);
  const list = el("div", { class: "list", tabindex: 0, role: "listbox", "aria-label": "latents" });
  const detail = el("article", { "aria-live": "polite" });
  const count = el("span", { class: "soft", role: "status" });
  const box = el("input", { type: "search", id: "search", placeholder: "search tokens  ( / )",
    "aria-label": "search", value: state.query, oninput: e => {
      state.query = e.target.value; fill(find(columns, lower, state.sort)); } });
  const bar = el("div", { class: "bar" }, box,
    el("label", { class: "field" }, "by ", el("select", { "aria-label": "sort", onchange: e =>
      go({ sort: e.target.value, up: e.target.value === "number" }) }, ...names.map(name => el("option",
      { value: name, ...(name === state.sort ? { selected: "" } : {}) }, MEASURES[name])))),
    el("button", { type: "button", onclick: () => go({ up: !state.up }) }, state.up ? "↑ least first" : "↓ most first"),
    el("label", { class: "field" }, "density from ", el("select", { "aria-label": "density from",
      onchange: e => go({ least: +e.target.value }) }, ...[0, 1e-5, 1e-4, 1e-3, 1e-2].map(v => el("option",
      { value: v, ...(v === state.least ? { selected: "" } : {}) }, v ? three(v) : "0 (with silent)")))),
    state.brush ? el("button", { type: "button", onclick: () => go({ brush: null }) }, "selection ×") : null,
    count);
  main.replaceChildren(
    el("h1", {}, side ? `${own().name} beside ${about.dictionaries[other].name}` : `Latents of ${own().name}`),
    side ? el("p", { class: "soft" }, "Each latent with the latent of the other dictionary whose "
      + "direction is most like its own. Those without a likeness come first: only this dictionary found them.") : "",
    bar, el("div", { class: "split" }, list, detail));
  function cells(i) {
    const likeness = columns.likeness?.[i];
    return side
      ? [i, search[i], likeness.toFixed(2), theirs[columns.partner[i]]]
      : [i, search[i], three(columns.density[i]), three(columns.largest[i])];
  }
  const kind = side ? "two" : "one";
  const heads = side ? ["", "fires on › promotes", "cosine", "its partner"]
    : ["", "fires on › promotes", "density", "largest"];
  const head = el("div", { class: `row head ${kind}` }, ...heads.map((t, i) =>
    el("span", { class: i > 1 && !(side && i === 3) ? "number" : "" }, t)));
  const space = el("div"), rows = el("div");
  let shown = [];
  function paint() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW) + 12);
    rows.replaceChildren(...shown.slice(first, last).map((i, at) => {
      const node = el("div", { class: `row ${kind}`, role: "option", "aria-selected": i === state.latent,
        onclick: () => choose(i) }, ...cells(i).map((text, c) =>
        el("span", { class: c > 1 && !(side && c === 3) ? "number" : "", title: text }, String(text))));
      node.style.top = `${(first + at + 1) * ROW}px`;
      return node;
    }));
  }
  function fill(numbers) {
    shown = numbers;
    space.style.height = `${shown.length * ROW}px`;
    count.textContent = `${shown.length.toLocaleString("en")} of ${own().d_sae.toLocaleString("en")}`;
    list.scrollTop = 0;
    paint();
  }
  async function choose(i) {
    state.latent = i;
    history.replaceState(null, "", address());
    paint();
    detail.replaceChildren(...await latentPanel(i, columns));
  }
  state.step = by => {
    const at = shown.indexOf(state.latent), to = Math.max(0, Math.min(shown.length - 1, at + by));
    if (!shown.length) return;
    list.scrollTop = Math.max(0, (to - 4) * ROW);
    choose(shown[to]);
  };
  list.replaceChildren(head, space, rows);
  list.addEventListener("scroll", paint);
  fill(order);
  const start = state.latent ?? order[0];
  if (start !== undefined) {
    const at = order.indexOf(start);
    if (at > 5) list.scrollTop = (at - 4) * ROW;
    await choose(start);
  }
}

function find(columns, lower, sort) {
  const words = state.query.toLowerCase().split(/\s+/).filter(Boolean);
  const exact = words.length === 1 && /^#?\d+$/.test(words[0]) ? +words[0].replace("#", "") : null;
  const brush = state.brush?.d === state.d ? state.brush.inside : null;
  const found = [];
  for (let i = 0; i < lower.length; i++) {
    if (columns.density[i] < state.least || (state.view === "compare" && columns.density[i] === 0)) continue;
    if (brush && !brush.has(i)) continue;
    if (i === exact || words.every(word => lower[i].includes(word))) found.push(i);
  }
  const by = sort === "number" ? found : columns[sort];
  const sign = state.up ? 1 : -1;
  return found.sort((a, b) => sort === "number" ? sign * (a - b) : sign * (by[a] - by[b]) || a - b);
}

// --- one latent --------------------------------------------------------------------------------------

async function latentOf(i, d = state.d) {
  return (await unpack(`chunk-${d}-${Math.floor(i / CHUNK)}`))[i % CHUNK];
}

function token(text, shade, centre, title) {
  const node = el("span", { class: centre ? "token centre" : "token", dir: "auto", title }, text);
  if (shade) node.style.background = `rgba(var(--warm), ${shade / 12})`;
  return node;
}

function contexts(examples) {
  return examples.map(([, value, document_, centre, tokens, shades]) => el("div", { class: "context" },
    el("span", { class: "value", title: document_ }, three(value)),
    ...tokens.map((t, p) => token(state.words[t], shades[p], p === centre,
      shades[p] ? `about ${three(value * shades[p] / Math.max(shades[centre], 1))}` : null))));
}

function link(i, d = state.d, view = state.view) {
  return el("a", { href: `#${view}/d${d}/L${i}`, onclick: e => {
    e.preventDefault(); go({ d, latent: i, view, brush: null }); } }, `#${i}`);
}

async function latentPanel(i, columns) {
  const one = await latentOf(i), density = columns.density[i], search = await unpack(`search-${state.d}`);
  const marks = [density === 0 ? "silent here" : null, density > 0.1 ? "dense" : null,
    columns.nearest[i] > 0.9 ? "has a twin" : null].filter(Boolean);
  const words = (title, entries) => entries && el("section", {}, el("h2", {}, title), el("table", {},
    ...entries.map(([t, v]) => el("tr", {}, el("td", {}, token(state.words[t], 0)),
      el("td", { class: "number" }, three(v))))));
  const top = one.examples.filter(([n]) => n < about.top), bands = one.examples.filter(([n]) => n >= about.top);
  const partner = own().partner;
  const beside = [];
  if (partner !== null) {
    const p = columns.partner[i], it = await latentOf(p, partner), texts = await unpack(`search-${partner}`);
    beside.push(el("h2", {}, `Its partner in ${about.dictionaries[partner].name}`),
      el("p", {}, link(p, partner), ` cosine ${columns.likeness[i].toFixed(2)} · ${texts[p]}`),
      ...contexts(it.examples.filter(([n]) => n < 3)));
  }
  return [
    el("h1", {}, `Latent ${i}`, ...marks.map(m => el("span", { class: "mark" }, m))),
    el("p", { class: "soft" }, `fires on ${three(100 * density)} % of the rows · mean activation `
      + `${three(columns.mean[i])} · largest ${three(columns.largest[i])} · writes to `
      + `${three(columns.dimensions[i])} effective dimensions`),
    el("div", { class: "bar" }, histogram(one.histogram, "activations, rows on a log scale",
      [4, 12, 20].map(b => [b, three(own().firstEdge * 2 ** ((b - 1) / 2))])),
      one.logits && histogram(one.logits[2], "effect on logits, tokens on a log scale",
        [[0, three(one.logits[0])], [24, three(one.logits[1])]])),
    el("div", { class: "columns" }, words("promotes", one.promotes), words("suppresses", one.suppresses),
      el("section", {}, el("h2", {}, "nearest latents"), el("table", {}, ...one.neighbours.map(([n, c]) =>
        el("tr", {}, el("td", {}, link(n), ` ${search[n]}`), el("td", { class: "number" }, c.toFixed(2)))))),
      one.together.length ? el("section", {}, el("h2", {}, "fires together with"), el("table", {},
        ...one.together.map(([n, share]) => el("tr", {}, el("td", {}, link(n), ` ${search[n]}`),
          el("td", { class: "number", title: "of the rows on which either fires" }, `${three(100 * share)} %`))))) : null,
      el("section", {}, el("h2", {}, "writes to dimension"), el("table", {}, ...one.dimensions.map(
        ([dim, w, share, gamma]) => el("tr", { title: `weight ${three(w)}` }, el("td", {}, String(dim)),
          el("td", { class: "number" }, `${three(100 * share)} %`),
          el("td", { class: "number soft" }, gamma === null ? "" : `γ ${three(gamma)}`)))))),
    ...beside,
    el("h2", {}, "Strongest contexts"), ...(top.length ? contexts(top) : [el("p", { class: "soft" }, "It never fires here.")]),
    ...(bands.length ? [el("h2", {}, "From strong to weak, one of each band"), ...contexts(bands)] : []),
  ];
}

function histogram(counts, title, edges) {
  const most = Math.max(...counts, 1), ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg");
  const make = (name, attributes, text) => {
    const node = document.createElementNS(ns, name);
    for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
    if (text) node.textContent = text;
    svg.append(node);
  };
  svg.setAttribute("viewBox", "0 0 300 62"); svg.setAttribute("width", "300");
  svg.setAttribute("role", "img"); svg.setAttribute("aria-label", title);
  const width = 300 / counts.length;
  counts.forEach((c, b) => {
    const height = c ? 1 + 45 * Math.log1p(c) / Math.log1p(most) : 0;
    make("rect", { x: b * width, y: 48 - height, width: width - 1, height });
  });
  edges.forEach(([b, text]) => make("text", { x: b * width, y: 60,
    "text-anchor": b === 0 ? "start" : b === counts.length ? "end" : "middle" }, text));
  make("text", { x: 0, y: 10 }, title);
  return svg;
}

// --- prompts -------------------------------------------------------------------------------------------

function sentence(tokens, search) {
  const shown = el("div"), line = el("div", { class: "context" });
  const spans = tokens.map(([text, active], p) => {
    const node = token(text, 0, false, active.length ? null : "not explained");
    node.tabIndex = 0; node.style.cursor = "pointer";
    node.onclick = node.onfocus = () => pick(p);
    return node;
  });
  function pick(p) {
    spans.forEach((s, q) => s.classList.toggle("centre", q === p));
    shown.replaceChildren(el("table", {}, ...tokens[p][1].map(([i, v]) => {
      const row = el("tr", {}, el("td", {}, link(i, state.d, "latents"), ` ${search[i]}`),
        el("td", { class: "number" }, three(v)));
      row.onmouseenter = () => tokens.forEach(([, active], q) => {
        const there = active.find(([n]) => n === i);
        spans[q].style.background = there ? `rgba(var(--warm), ${Math.min(there[1] / v, 1) * .75})` : "";
      });
      return row;
    })));
  }
  line.append(...spans);
  const last = tokens.map(([, a]) => a.length > 0).lastIndexOf(true);
  if (last >= 0) pick(last);
  return el("section", { class: "card" }, line, shown);
}

async function ask(question) {
  const reply = await fetch("ask", { method: "POST", headers: { "content-type": "application/json" },
    body: JSON.stringify({ dictionary: state.d, ...question }) });
  const answer = await reply.json().catch(() => ({ error: "the server did not answer" }));
  if (answer.error) throw new Error(answer.error);
  return answer;
}

async function live() {
  const search = await unpack(`search-${state.d}`);
  state.text ??= "The state of our Union is";
  const text = el("textarea", { rows: 3, maxlength: 2000, "aria-label": "text" });
  text.value = state.text;
  text.oninput = () => { state.text = text.value; };
  const latent = el("input", { type: "number", min: 0, max: own().d_sae - 1, value: state.latent ?? 0,
    "aria-label": "latent" });
  const name = el("span", { class: "soft" });
  latent.oninput = () => { name.textContent = search[latent.value] ?? "no such latent"; };
  latent.oninput();
  const strength = el("input", { type: "range", min: -100, max: 100, value: 30, "aria-label": "strength" });
  const dial = el("output", {}, strength.value);
  strength.oninput = () => { dial.textContent = strength.value; };
  const count = el("select", { "aria-label": "tokens" }, ...[20, 40, 60].map(n => el("option", { value: n }, n)));
  const shown = el("div", { role: "status" }), written = el("div", { role: "status" });
  const during = (where, work) => async () => {
    where.replaceChildren(el("p", { class: "soft" }, "…"));
    try { where.replaceChildren(...await work()); }
    catch (error) { where.replaceChildren(el("p", {}, error.message)); }
  };
  const read = during(shown, async () => [sentence((await ask({ text: text.value })).tokens, search)]);
  const write = during(written, async () => {
    const it = await ask({ text: text.value, latent: +latent.value, strength: +strength.value, tokens: +count.value });
    return [el("div", { class: "cards" },
      el("section", { class: "card" }, el("h2", {}, "as it is"), el("p", { class: "token" }, text.value + it.before)),
      el("section", { class: "card" }, el("h2", {}, `latent ${latent.value} turned by ${strength.value}`),
        el("p", { class: "token" }, text.value + it.after))),
      el("p", { class: "soft" }, it.change === 0 ? "The edit changed no logit."
        : `The edit changed a logit of the last token by up to ${three(it.change)}.`)];
  });
  main.replaceChildren(el("h1", {}, `Ask the model, with ${own().name}`), text,
    el("div", { class: "bar" }, el("button", { type: "button", id: "read", onclick: read }, "show its latents")), shown,
    el("h2", {}, "Turn a latent up or down, and read what the model writes"),
    el("div", { class: "bar" }, el("label", { class: "field" }, "latent", latent), name,
      el("label", { class: "field" }, "strength", strength, dial), el("label", { class: "field" }, "tokens", count),
      el("button", { type: "button", id: "write", onclick: write }, "write")), written);
}

async function prompts() {
  const search = await unpack(`search-${state.d}`);
  const parts = about.prompts.map(prompt =>
    sentence(prompt[own().name].map(([t, active]) => [state.words[t], active]), search));
  main.replaceChildren(el("h1", {}, `Sentences, as ${own().name} sees them`), el("p", { class: "soft" },
    "Choose a token to see the latents that fire on it; point at a latent to see where else it fires."), ...parts);
}

// --- start -----------------------------------------------------------------------------------------------

document.getElementById("dictionary").onchange = e => go({ d: +e.target.value, latent: null });
document.getElementById("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark"
    || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  if (state.view === "overview") draw();
};
addEventListener("hashchange", () => { readAddress(); draw(); });
addEventListener("keydown", e => {
  if (e.target.matches("input, select")) return e.key === "Escape" ? e.target.blur() : undefined;
  if (e.key === "/") { e.preventDefault(); document.getElementById("search")?.focus(); }
  if (e.key === "j" || e.key === "ArrowDown") { e.preventDefault(); state.step?.(1); }
  if (e.key === "k" || e.key === "ArrowUp") { e.preventDefault(); state.step?.(-1); }
});
readAddress();
draw();
