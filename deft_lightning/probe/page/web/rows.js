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
  const [id, , rank, score, nll, source, ops, wrong, , , where] = meta.rows[r], locked = count(r, isLocked);
  const head = make("header");
  head.append(make("b", `#${rank}`), make("span", id), make("span", where));
  if (source >= 0) head.append(make("span", meta.sources[source]));
  for (const text of [score === null ? "" : `suspicion ${short(score)}`, nll === null ? "" : `nll ${short(nll)}`,
    `${starts[r + 1] - starts[r]} tokens`, `mean ${view().name} ${changing() ? signed(mean(r)) : short(mean(r))}`,
    `${count(r, i => isShut(i))} shut`, locked ? `${locked} locked` : ""]) if (text) head.append(make("span", text));
  for (const op of ops) head.append(make("b", `corrupted: ${meta.operations[op - 1]}`, "badge"));
  if (wrong === true) head.append(make("b", "marked as noisy", "badge"));
  return head;
}
function beginning(text, query) {
  // What all rows begin with, the system's turn say, is shown when it is asked for.
  const node = read(text.slice(meta.common), query), button = make("button", "…");
  button.type = "button";
  button.title = "what all rows begin with";
  button.setAttribute("aria-label", button.title);
  button.onclick = () => button.replaceWith(text.slice(0, meta.common));
  node.prepend(button);
  return node;
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
      if (size) body.append((run || !meta.common ? read : beginning)(text.slice(at, at + size), query));
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
  const names = changing() ? [`fell by ${much} or more`, `by ${some} to ${much}`, "about the same", `rose by ${some} to ${much}`,
    `by ${much} or more`] : one.legend;
  legend.replaceChildren(make("b", (changing() ? "change of " : "") + (one.gate ? `gate of ${one.name}` : one.name)));
  legend.append(make("span", `mean ${changing() ? signed(sum / n) : short(sum / n)}`));
  names.forEach((name, level) => {
    const item = make("span");
    item.append(make("span", name, `t ${changing() ? "c" : "l"}${level}`), share(totals[level]));
    legend.append(item);
  });
  if (one.gate && !changing()) legend.append(make("span", `◆ locked (sure, wrong, shut)${share(locked)}`, "wide"));
  if (meta.operations.length) legend.append(make("span", "dashed line above: corrupted on purpose", "wide"));
  byId("count").textContent = `${state.order.length.toLocaleString("en")} of ${meta.rows.length.toLocaleString("en")} rows, ${n.toLocaleString("en")} tokens`;
  const title = one.gate ? `${one.name}` : views[state.gate].name;
  for (const option of byId("filter").options) {
    const under = ["locked", "shut"].includes(option.value) ? ` under ${title}` : "";
    option.textContent = FILTERS[option.value][0] + under;
  }
}
