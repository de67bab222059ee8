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
const isSuspicious = i => (models[side()].columns.flags.codes[i] & 4) > 0;
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
  wrong: ["marked as noisy", r => meta.rows[r][7] === true],
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
  state.kept = null;
  state.shown = 0;
  byId("rows").replaceChildren();
  more();
  describe();
}
