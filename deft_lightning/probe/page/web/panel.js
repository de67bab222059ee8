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
    if (step > 0 && state.shown < state.order.length) { more(); dark(step); }
  };
  const next = () => { if (here + 1 === rows.length) more(); focusRow(document.querySelectorAll(".row")[here + 1]); };
  const actions = {
    "/": () => byId("search").focus(), "?": () => byId("keys").showModal(), "[": () => choose(state.view - 1),
    "]": () => choose(state.view + 1), j: next, k: () => focusRow(rows[Math.max(0, here - 1)]),
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
function common() {
  // Letters that all rows begin with, up to the end of a line; 0 where they are few.
  const [first, ...others] = meta.rows.map(row => row[9].slice(0, row[8][0]));
  let length = others.length ? first.length : 0;
  for (const other of others) while (length && other.slice(0, length) !== first.slice(0, length)) length--;
  length = first.slice(0, length).lastIndexOf("\n") + 1;
  return length < 40 ? 0 : length;
}
async function start() {
  [meta, blob] = [JSON.parse(new TextDecoder().decode(await unpack("meta"))), await unpack("numbers")];
  starts = [0];
  for (const row of meta.rows) starts.push(starts.at(-1) + row[8].reduce((sum, n, i) => sum + (i % 2 ? n : 0), 0));
  total = starts.at(-1);
  meta.lower = meta.rows.map(row => row[9].toLowerCase());
  meta.common = common();
  load();
  const rows = meta.rows.length < meta.total ? `${meta.rows.length.toLocaleString("en")} of ${meta.total.toLocaleString("en")} rows, half of them the worst, half spread over the others` : `${meta.rows.length.toLocaleString("en")} rows`;
  byId("about").title = models.map(model => model.path).join(" against ");
  byId("about").textContent = `${models.map(model => model.name).join(" against ")} · ${meta.data} · ${rows} · deft_lightning ${meta.version}`;
  views.forEach((one, place) => chip(byId(one.gate ? "gates" : "statistics"), "view", one.name + (one.starred ? " ★" : ""), one.about, place === 0, () => choose(place)));
  if (models.length > 1) {
    byId("sides").hidden = false;
    byId("detail").className = "two";
    [...models.map(model => model.name), "change from first to second"].forEach((name, place) =>
      chip(byId("models"), "side", place < 2 ? `${["first", "second"][place]}: ${name}` : name, models[place]?.path || "", place === 0, () => { state.side = place; refresh(); }));
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
