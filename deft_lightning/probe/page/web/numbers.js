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
    name: one.name, about: one.about + (one.name === models[0].chosen ? " ★ the objective of the run" : ""), gate: true,
    starred: one.name === models[0].chosen, level: low([0, .3, .6, .9]), step: [.1, .5],
    legend: ["shut: below 0.1", "to 0.3", "to 0.6", "to 0.9", "open: 0.9 and more"],
    of: models.map(model => model.gates[one.name]),
  }));
  for (const one of STATISTICS) {
    const of = models.map(model => model.columns[one.key]).map(c => c && one.prob ? negated(c) : c);
    if (of[0]) views.push({...one, of});
  }
}
