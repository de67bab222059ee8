"use strict";
// Rows and numbers of this page are in it, deflated. Text of a row is only ever set as text, never as markup.
const byId = id => document.getElementById(id);
const make = (tag, text, name) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return node;
};
const AT_ONCE = 25, LONG = 500, LN10 = Math.LN10;

async function unpack(id) {
  const packed = atob(byId(id).textContent), bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// --- numbers ----------------------------------------------------------------------------------------------------------

let meta, blob, total, starts, lengths;
function column(place, order) {
  // A function from the number of a token to its value, and the codes.
  const codes = new Uint32Array(total);
  for (let byte = 0; byte < place.width; byte++)
    for (let i = 0, at = place.at + byte * total; i < total; i++) codes[place.sorted ? order[i] : i] |= blob[at + i] << 8 * byte;
  const value = place.kind === "share" ? i => meta.levels[codes[i]] : place.kind === "nats" ? i => codes[i] / meta.nats
    : i => codes[i];
  return {codes, value};
}
function alike(logs, collisions) {
  // The order in which other columns are written, tokens of like p and C together: a stable sort by counting.
  const key = i => Math.floor(Math.sqrt(logs[i])) << 8 | collisions[i], next = new Uint32Array(65537), order = new Uint32Array(total);
  for (let i = 0; i < total; i++) next[key(i) + 1]++;
  for (let k = 0; k < 65536; k++) next[k + 1] += next[k];
  for (let i = 0; i < total; i++) order[next[key(i)]++] = i;
  return order;
}
const low = bounds => value => { let l = 0; while (l < 4 && value >= bounds[l]) l++; return l; };
const high = bounds => value => { let l = 0; while (l < 4 && value < bounds[l]) l++; return l; };
const negated = column => ({codes: column.codes, value: i => Math.exp(-column.value(i))});
const STATISTICS = [
  {key: "log_prob", name: "p", about: "probability of the label", prob: true, level: low([.01, .1, .5, .9]),
   legend: ["below 0.01", "to 0.1", "to 0.5", "to 0.9", "0.9 and more"], step: [.1, .5]},
  {key: "conflict", name: "conflict", about: "confident conflict max(0, log C/p), in nats",
   level: high([2 * LN10, LN10, 1, .1]), legend: ["4.6 nats and more", "2.3 to 4.6", "1 to 2.3", "0.1 to 1", "less"],
   step: [.7, 2.3], up: true},
  {key: "collision", name: "C", about: "collision probability: how sure the model is", level: high([.9, .5, .3, .1]),
   legend: ["0.9 and more", "0.5 to 0.9", "0.3 to 0.5", "0.1 to 0.3", "less"], step: [.1, .5], up: true},
  {key: "entropy", name: "entropy", about: "entropy of the prediction, in nats", level: high([4, 2, 1, .3]),
   legend: ["4 nats and more", "2 to 4", "1 to 2", "0.3 to 1", "less"], step: [.7, 2.3], up: true},
  {key: "chance", name: "chance", about: "how frequent the token is among the training labels", prob: true,
   level: low([1e-5, 1e-4, 1e-3, 1e-2]), legend: ["below 0.00001", "to 0.0001", "to 0.001", "to 0.01", "0.01 and more"]},
  {key: "unprompted", name: "without prompt", about: "probability of the label without the prompt", prob: true,
   level: low([.01, .1, .5, .9]), legend: ["below 0.01", "to 0.1", "to 0.5", "to 0.9", "0.9 and more"], step: [.1, .5]},
  {key: "weight", name: "weight", about: "factor on the loss of the token", level: low([.1, .5, .9, .999]),
   legend: ["below 0.1", "to 0.5", "to 0.9", "to 1", "1 and more"]},
];
let models, views, flags, noise;
function load() {
  lengths = column(meta.shared.lengths).codes;
  noise = column(meta.shared.noise).codes;
  models = meta.models.map(model => {
    const order = alike(column(model.columns.log_prob).codes, column(model.columns.collision).codes);
    const columns = Object.fromEntries(Object.entries({...meta.shared, ...model.columns}).map(([k, v]) => [k, column(v, order)]));
    const gates = Object.fromEntries(model.objectives.map(one => [one.name, column(one, order)]));
    return {...model, columns, gates};
  });
  views = models[0].objectives.map(one => ({
    name: one.name, about: one.about || (one.name === models[0].chosen ? "the objective of this model" : ""), gate: true,
    starred: one.name === models[0].chosen, level: low([0, .3, .6, .9]), step: [.1, .5],
    legend: ["shut: below 0.1", "to 0.3", "to 0.6", "to 0.9", "open: 0.9 and more"],
    of: models.map(model => model.gates[one.name]),
  }));
  for (const one of STATISTICS) {
    const of = models.map(model => model.columns[one.key]).map(c => c && one.prob ? negated(c) : c);
    if (of[0]) views.push({...one, of});
  }
}

// --- state --------------------------------------------------------------------------------------------------------------

const state = {view: 0, side: 0, gate: 0, order: [], shown: 0, kept: null, at: null, query: ""};
const view = () => views[state.view];
const changing = () => state.side === 2;
const side = () => (changing() ? 1 : state.side);
function value(i, one = view()) {
  if (!changing()) return (one.of[state.side] || one.of[0]).value(i);
  return one.of[1] ? one.of[1].value(i) - one.of[0].value(i) : 0;
}
const isShut = (i, one = views[state.gate]) => (one.of[side()] || one.of[0]).codes[i] < meta.shut;
const isLocked = i => (models[side()].columns.flags.codes[i] & 3) === 2 && isShut(i);
const isSuspicious = i => models[side()].columns.conflict.value(i) >= meta.suspicious;
function levelOf(i) {
  const one = view(), v = value(i);
  if (changing()) {
    const [some, much] = one.step || [.1, .5];
    return v <= -much ? 0 : v <= -some ? 1 : v < some ? 2 : v < much ? 3 : 4;
  }
  return one.gate && isShut(i, one) ? 0 : one.gate ? Math.max(1, one.level(v)) : one.level(v);
}
function some(r, test) { for (let i = starts[r]; i < starts[r + 1]; i++) if (test(i)) return true; return false; }
function count(r, test) { let n = 0; for (let i = starts[r]; i < starts[r + 1]; i++) n += test(i); return n; }
function mean(r, of = i => value(i)) {
  let sum = 0;
  for (let i = starts[r]; i < starts[r + 1]; i++) sum += of(i);
  return sum / Math.max(1, starts[r + 1] - starts[r]);
}
const FILTERS = {
  all: ["all", () => true],
  locked: ["with locked tokens", r => some(r, isLocked)],
  shut: ["with shut tokens", r => some(r, i => isShut(i))],
  suspicious: ["with suspicious tokens", r => some(r, isSuspicious)],
  noisy: ["noisy: corrupted on purpose", r => meta.rows[r][6].length > 0],
  clean: ["not corrupted", r => meta.rows[r][6].length === 0],
  wrong: ["marked as wrong", r => meta.rows[r][7] === true],
};
const SORTS = {
  worst: ["worst first", (a, b) => meta.rows[a][2] - meta.rows[b][2]],
  lowest: ["lowest mean of the colour first", null], highest: ["highest mean of the colour first", null],
  locked: ["most locked tokens first", null], data: ["as in the data", (a, b) => meta.rows[a][1] - meta.rows[b][1]],
  longest: ["longest first", (a, b) => starts[b + 1] - starts[b] - starts[a + 1] + starts[a]],
};
function arrange() {
  const filter = FILTERS[byId("filter").value][1], source = byId("source").value, sort = byId("sort").value;
  const query = state.query = byId("search").value.toLowerCase();
  let order = meta.rows.map((_, r) => r).filter(r => (source === "" || meta.rows[r][5] === +source) && filter(r)
    && (!query || meta.lower[r].includes(query) || meta.rows[r][0].toLowerCase().includes(query)));
  const key = {lowest: r => mean(r), highest: r => -mean(r), locked: r => -count(r, isLocked)}[sort];
  if (key) {
    const keys = new Map(order.map(r => [r, key(r)]));
    order.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
  } else order.sort(SORTS[sort][1]);
  state.order = order;
  state.shown = 0;
  byId("rows").replaceChildren();
  more();
  describe();
}

// --- drawing ------------------------------------------------------------------------------------------------------------

const short = v => !isFinite(v) ? "–" : v === 0 ? "0" : Math.abs(v) >= 100 ? v.toFixed(0) : Math.abs(v) >= .01 ? v.toFixed(2)
  : v.toExponential(0);
const signed = v => (v > 0 ? "+" : v < 0 ? "−" : "") + short(Math.abs(v));
const seen = text => text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t") || "◦";
function paint(node, i) {
  const level = levelOf(i), kept = ["hit", "on"].filter(name => node.classList.contains(name));
  node.className = `t ${changing() ? "c" : "l"}${level}` + (view().gate && !changing() && isLocked(i) ? " lk" : "")
    + (noise[i] ? " nz" : "") + (kept.length ? " " + kept.join(" ") : "");
}
function read(text, query) {
  // Text that is only read: its middle left out where it is long, and what is searched for marked.
  const node = make("span", undefined, "ctx"), at = query ? text.toLowerCase().indexOf(query) : -1;
  if (at >= 0) {
    node.append(text.slice(0, at), make("mark", text.slice(at, at + query.length)), text.slice(at + query.length));
  } else if (text.length > LONG + 100) {
    const button = make("button", `… ${(text.length - LONG).toLocaleString("en")} more letters …`);
    button.type = "button";
    button.onclick = () => { button.replaceWith(text.slice(LONG / 2, text.length - LONG / 2)); };
    node.append(text.slice(0, LONG / 2), button, text.slice(text.length - LONG / 2));
  } else node.textContent = text;
  return node;
}
function summary(r) {
  const [id, , rank, score, nll, source, ops, wrong] = meta.rows[r], locked = count(r, isLocked);
  const head = make("header");
  head.append(make("b", `#${rank}`), make("span", id));
  if (source >= 0) head.append(make("span", meta.sources[source]));
  for (const text of [score === null ? "" : `suspicion ${short(score)}`, nll === null ? "" : `nll ${short(nll)}`,
    `${starts[r + 1] - starts[r]} tokens`, `mean ${view().name} ${changing() ? signed(mean(r)) : short(mean(r))}`,
    `${count(r, i => isShut(i))} shut`, locked ? `${locked} locked` : ""]) if (text) head.append(make("span", text));
  for (const op of ops) head.append(make("b", `corrupted: ${meta.operations[op - 1]}`, "badge"));
  if (wrong === true) head.append(make("b", "marked as wrong", "badge"));
  return head;
}
function draw(r) {
  const row = make("article", undefined, "row"), body = make("p", undefined, "text"), [, , , , , , , , runs, text] = meta.rows[r];
  row.dataset.row = r;
  row.setAttribute("aria-label", `row ${meta.rows[r][2]}: ${meta.rows[r][0]}`);
  const query = state.query, hits = [];
  for (let at = query ? meta.lower[r].indexOf(query) : -1; at >= 0 && hits.length < 50;
    at = meta.lower[r].indexOf(query, at + 1)) hits.push(at);
  let at = 0, i = starts[r], first = true;
  runs.forEach((size, run) => {
    if (run % 2 === 0) {
      if (size) body.append(read(text.slice(at, at + size), query));
      at += size;
      return;
    }
    for (let n = 0; n < size; n++, i++) {
      const node = make("span", seen(text.slice(at, at + lengths[i]))), end = at + lengths[i];
      node.dataset.token = i;
      if (first) node.tabIndex = 0;
      first = false;
      paint(node, i);
      if (hits.some(hit => hit < end && hit + query.length > at)) node.classList.add("hit");
      body.append(node);
      at = end;
    }
  });
  row.append(summary(r), body);
  return row;
}
function more() {
  byId("more")?.remove();
  const next = state.order.slice(state.shown, state.shown + AT_ONCE);
  byId("rows").append(...next.map(draw));
  state.shown += next.length;
  if (state.shown < state.order.length) {
    const button = make("button", `Show more: ${state.shown} of ${state.order.length.toLocaleString("en")} rows`);
    button.id = "more";
    button.type = "button";
    button.onclick = () => { const last = byId("rows").children.length - 1; more(); focusRow(byId("rows").children[last]); };
    byId("rows").append(button);
    new IntersectionObserver((seen, watcher) => {
      if (seen.some(one => one.isIntersecting)) { watcher.disconnect(); if (button.isConnected && document.activeElement !== button) more(); }
    }, {rootMargin: "600px"}).observe(button);
  } else if (!state.order.length) {
    const none = make("p", "No row is like that.");
    none.id = "none";
    byId("rows").append(none);
  }
}
function repaint() {
  for (const row of document.querySelectorAll(".row")) {
    row.querySelector("header").replaceWith(summary(+row.dataset.row));
    for (const node of row.querySelectorAll(".t")) paint(node, +node.dataset.token);
  }
}
function describe() {
  const one = view(), totals = [0, 0, 0, 0, 0], legend = byId("legend");
  let sum = 0, n = 0, locked = 0;
  for (const r of state.order) for (let i = starts[r]; i < starts[r + 1]; i++) {
    totals[levelOf(i)]++; sum += value(i); n++; locked += isLocked(i);
  }
  const share = k => ` ${(100 * k / Math.max(1, n)).toFixed(k && k < n / 100 ? 1 : 0)} %`;
  const [some, much] = one.step || [.1, .5];
  const names = changing() ? [`fell by ${much} or more`, `fell by ${some}`, "about the same", `rose by ${some}`, `rose by ${much} or more`]
    : one.legend;
  legend.replaceChildren(make("b", (changing() ? "change of " : "") + (one.gate ? `gate of ${one.name}` : one.name)));
  legend.append(make("span", `mean ${changing() ? signed(sum / n) : short(sum / n)}`));
  names.forEach((name, level) => {
    const item = make("span");
    item.append(make("span", name, `t ${changing() ? "c" : "l"}${level}`), share(totals[level]));
    legend.append(item);
  });
  if (one.gate && !changing()) legend.append(make("span", `◆ locked (sure, wrong, shut)${share(locked)}`, "wide"));
  if (meta.operations.length) legend.append(make("span", "dashed box: corrupted on purpose", "wide"));
  byId("count").textContent = `${state.order.length.toLocaleString("en")} of ${meta.rows.length.toLocaleString("en")} rows, ${n.toLocaleString("en")} tokens`;
  const title = one.gate ? `${one.name}` : views[state.gate].name;
  for (const option of byId("filter").options) {
    const under = ["locked", "shut"].includes(option.value) ? ` under ${title}` : "";
    option.textContent = FILTERS[option.value][0] + under;
  }
}

// --- the numbers of a token ---------------------------------------------------------------------------------------------

function rowOf(i) {
  let a = 0, b = meta.rows.length;
  while (b - a > 1) { const m = (a + b) >> 1; if (starts[m] <= i) a = m; else b = m; }
  return a;
}
function textOf(i) {
  const r = rowOf(i), runs = meta.rows[r][8];
  let at = 0, token = starts[r];
  for (let run = 0; run < runs.length; run++) {
    if (run % 2 === 0) { at += runs[run]; continue; }
    for (let n = 0; n < runs[run]; n++, token++) {
      if (token === i) return meta.rows[r][9].slice(at, at + lengths[i]);
      at += lengths[token];
    }
  }
  return "";
}
function table(caption, rows) {
  const home = make("table"), body = make("tbody");
  home.append(make("caption", caption), body);
  if (models.length > 1) {
    const head = make("tr");
    head.append(make("th", ""), make("td", "first"), make("td", "second"));
    body.append(head);
  }
  for (const one of rows) {
    const line = make("tr", undefined, one === view() ? "on" : ""), name = make("th", one.name);
    name.scope = "row";
    name.title = one.about;
    line.append(name);
    line.dataset.name = one.name;
    models.forEach((_, m) => line.append(make("td", one.of[m] ? short(one.of[m].value(state.at)) : "–")));
    if (models.length === 1 && one.gate) {
      const cell = make("td"), meter = make("meter");
      meter.value = Math.min(1, one.of[0].value(state.at));
      meter.setAttribute("aria-hidden", "true");
      cell.append(meter);
      line.append(cell);
    }
    body.append(line);
  }
  return home;
}
function show(i) {
  state.at = i;
  const r = rowOf(i), panel = byId("detail"), title = make("p", undefined, "token"), parts = [title];
  title.append(make("q", seen(textOf(i))), ` ${view().name} ${changing() ? signed(value(i)) : short(value(i))}`);
  for (const [m, model] of models.entries()) {
    const right = model.columns.flags.codes[i] & 1, said = model.columns.said ? model.columns.said.codes[i] : 0;
    const who = models.length > 1 ? (m ? "The second model" : "The first model") : "The model";
    const line = make("p", right ? `${who} would say the same.` : said ? `${who} would say ` : `${who} would say another token.`);
    if (!right && said) line.append(make("q", seen(meta.words[said - 1])), ".");
    parts.push(line);
  }
  const badges = [isLocked(i) ? `◆ locked under ${views[state.gate].name}` : "", isSuspicious(i) ? "suspicious" : "",
    noise[i] ? `corrupted: ${meta.operations[noise[i] - 1]}` : ""].filter(text => text);
  if (badges.length) parts.push(make("p", badges.join("; "), "badge"));
  parts.push(make("p", `token ${i - starts[r] + 1} of ${starts[r + 1] - starts[r]} in row #${meta.rows[r][2]}, ${meta.rows[r][0]}`));
  parts.push(table("numbers", views.filter(one => !one.gate)), table("gates", views.filter(one => one.gate)));
  panel.replaceChildren(...parts);
  return `${seen(textOf(i))}, ${view().name} ${changing() ? signed(value(i)) : short(value(i))}` + (badges.length ? `, ${badges.join(", ")}` : "");
}
function keep(node) {
  document.querySelector(".t.on")?.classList.remove("on");
  const same = state.kept === +node.dataset.token;
  state.kept = same ? null : +node.dataset.token;
  if (same) return;
  node.classList.add("on");
  show(state.kept);
  node.scrollIntoView({block: "nearest"});
}
const tokenOf = event => event.target.closest?.("#rows .t");
function focusToken(node) {
  if (!node) return;
  node.tabIndex = 0;
  node.focus();
}
function focusRow(row) {
  if (!row?.classList.contains("row")) return;
  row.scrollIntoView({block: "start"});
  focusToken(row.querySelector(".t"));
}
function choose(place) {
  state.view = (place + views.length) % views.length;
  if (view().gate) state.gate = state.view;
  document.querySelectorAll('input[name="view"]')[state.view].checked = true;
  refresh();
}
function refresh() {
  if (["lowest", "highest", "locked"].includes(byId("sort").value) || ["locked", "shut", "suspicious"].includes(byId("filter").value)) arrange();
  else { repaint(); describe(); }
  if (state.at !== null) show(state.at);
}
function pressed(event) {
  const node = document.activeElement?.closest?.("#rows .t"), typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName)
    && document.activeElement.type !== "radio";
  if (typing || event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const row = document.activeElement?.closest?.(".row"), tokens = row ? [...row.querySelectorAll(".t")] : [], at = tokens.indexOf(node);
  const rows = [...document.querySelectorAll(".row")], here = rows.indexOf(row);
  const dark = step => {
    const all = [...document.querySelectorAll("#rows .t")], from = all.indexOf(node);
    for (let i = from + step; i >= 0 && i < all.length; i += step) if (all[i].matches(".l0, .c0, .c4")) return focusToken(all[i]);
  };
  const actions = {
    "/": () => byId("search").focus(), "?": () => byId("keys").showModal(), "[": () => choose(state.view - 1),
    "]": () => choose(state.view + 1), j: () => focusRow(rows[here + 1]), k: () => focusRow(rows[Math.max(0, here - 1)]),
    n: () => dark(1), p: () => dark(-1), ...(node ? {
      ArrowRight: () => focusToken(tokens[at + 1]), ArrowLeft: () => focusToken(tokens[at - 1]),
      Home: () => focusToken(tokens[0]), End: () => focusToken(tokens.at(-1)), Enter: () => keep(node), " ": () => keep(node),
    } : {}),
  };
  if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
}

// --- the start ----------------------------------------------------------------------------------------------------------

function chip(home, group, text, title, checked, act) {
  const label = make("label"), input = make("input");
  input.type = "radio";
  input.name = group;
  input.checked = checked;
  input.onchange = act;
  label.title = title;
  label.append(input, text);
  home.append(label);
}
function option(home, key, text) {
  const one = make("option", text);
  one.value = key;
  home.append(one);
}
async function start() {
  [meta, blob] = [JSON.parse(new TextDecoder().decode(await unpack("meta"))), await unpack("numbers")];
  starts = [0];
  for (const row of meta.rows) starts.push(starts.at(-1) + row[8].reduce((sum, n, i) => sum + (i % 2 ? n : 0), 0));
  total = starts.at(-1);
  meta.lower = meta.rows.map(row => row[9].toLowerCase());
  load();
  const rows = meta.rows.length < meta.total ? `${meta.rows.length.toLocaleString("en")} of ${meta.total.toLocaleString("en")} rows, half of them the worst, half spread over the others` : `${meta.rows.length.toLocaleString("en")} rows`;
  byId("about").textContent = `${models.map(model => model.name).join(" against ")} · ${meta.data} · ${rows} · deft_lightning ${meta.version}`;
  views.forEach((one, place) => chip(byId(one.gate ? "gates" : "statistics"), "view", one.name + (one.starred ? " ★" : ""), one.about, place === 0, () => choose(place)));
  if (models.length > 1) {
    byId("sides").hidden = false;
    byId("detail").className = "two";
    [...models.map(model => model.name), "change from first to second"].forEach((name, place) =>
      chip(byId("models"), "side", place < 2 ? `${["first", "second"][place]}: ${name}` : name, "", place === 0, () => { state.side = place; refresh(); }));
  }
  const known = {noisy: meta.operations.length, clean: meta.operations.length, wrong: meta.rows.some(row => row[7] !== null)};
  for (const [key, [text]] of Object.entries(FILTERS)) if (known[key] === undefined || known[key]) option(byId("filter"), key, text);
  for (const [key, [text]] of Object.entries(SORTS)) option(byId("sort"), key, text);
  option(byId("source"), "", "all");
  meta.sources.forEach((name, place) => option(byId("source"), place, name));
  byId("by_source").hidden = !meta.sources.length;
  for (const id of ["filter", "source", "sort"]) byId(id).onchange = arrange;
  let waiting;
  byId("search").oninput = () => { clearTimeout(waiting); waiting = setTimeout(arrange, 150); };
  byId("controls").onsubmit = event => { event.preventDefault(); arrange(); };
  byId("help").onclick = () => byId("keys").showModal();
  const themes = ["system", "light", "dark"];
  byId("theme").onclick = () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "system") + 1) % 3];
    document.documentElement.dataset.theme = next;
    byId("theme").textContent = `Theme: ${next}`;
  };
  document.addEventListener("keydown", pressed);
  byId("rows").addEventListener("mouseover", event => { const node = tokenOf(event); if (node && state.kept === null) show(+node.dataset.token); });
  byId("rows").addEventListener("focusin", event => { const node = tokenOf(event); if (node) { node.setAttribute("role", "button"); node.setAttribute("aria-label", show(+node.dataset.token)); } });
  byId("rows").addEventListener("click", event => { const node = tokenOf(event); if (node) keep(node); });
  arrange();
  document.documentElement.dataset.ready = "yes";
}
start().catch(error => {
  byId("loading").textContent = typeof DecompressionStream === "undefined"
    ? "This browser cannot unpack the page: it takes Chrome 80, Firefox 113 or Safari 16.4, or newer." : `The page is damaged: ${error}`;
});
