// The page's controls and its table. The view is kept in the address (#data_type=nf&frontier=1), so that a link shows what
// its sender saw, and a selected experiment is a link.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const FILTERS = { family: "family", bits: "bits", data_type: "data type", block_size: "block size", method: "method" };
const ROWS = 100; // of the table at a time
const byId = (id) => document.getElementById(id);
const chart = new Chart(byId("chart"));
const view = { sort: "total_bits", descending: false, first: 0, key: null };
let measure = null;
let shown = []; // the points that pass the filters, in the table's order

// What the table shows of a point: its head, the cell to sort by, and the text, where it is another.
const COLUMNS = {
  model: { title: "model", cell: (p) => nameOf(data, measure, "model", p) },
  family: { title: "family", cell: (p) => nameOf(data, measure, "family", p) },
  bits: { title: "bits", cell: (p) => Number(nameOf(data, measure, "bits", p)), isNumber: true },
  quantizer: { title: "quantizer", cell: (p) => nameOf(data, measure, "quantizer", p) },
  block_size: { title: "block size", cell: (p) => asNumber(nameOf(data, measure, "block_size", p)) },
  method: { title: "method", cell: (p) => nameOf(data, measure, "method", p) },
  total_bits: {
    title: "total bits", cell: (p) => data.experiments.total_bits[measure.point[p]], isNumber: true,
    text: (bits) => `${formatCount(bits, " ")}bit`,
  },
  bits_per_param: {
    title: "bits per parameter", cell: (p) => data.experiments.bits_per_param[measure.point[p]], isNumber: true,
    text: (bits) => (bits === null ? "-" : bits.toFixed(3)),
  },
  value: { title: "value", cell: (p) => measure.value[p], isNumber: true, text: formatValue },
  low: {
    title: "95% interval", cell: (p) => measure.low[p], isNumber: true,
    text: (low, p) => (low === null ? "-" : `${formatValue(low)} to ${formatValue(measure.high[p])}`),
  },
  evaluation: { title: "evaluation", cell: (p) => measure.evaluations[measure.evaluation[p]] + (isStopped(p) ? ", stopped early" : "") },
  key: { title: "experiment", cell: (p) => data.experiments.key[measure.point[p]] },
};

function isStopped(point) {
  return data.experiments.stopped[measure.point[point]] === 1;
}

function asNumber(name) {
  return name !== "" && !isNaN(name) ? Number(name) : name;
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function makeControls() {
  for (const group of ["main", "other"]) {
    const members = data.measures.filter((each) => each.group === group);
    const options = members.map((each) => new Option(each.label, each.label));
    if (members.length) byId("measure").append(make("optgroup", { label: group }, ...options));
  }
  for (const [column, title] of Object.entries(FILTERS)) {
    byId("hue").append(new Option(title, column));
    const setAll = (checked) => () => {
      for (const input of document.getElementsByName(column)) input.checked = checked;
      change();
    };
    const legend = make("legend", {}, `${title} `);
    for (const [label, checked] of [["all", true], ["none", false]]) {
      const button = make("button", { type: "button", textContent: label, onclick: setAll(checked) });
      button.setAttribute("aria-label", `${label} of ${title}`);
      legend.append(button);
    }
    const box = make("fieldset", {}, legend);
    for (const value of data.experiments[column].names) {
      if (OF_QUANTIZERS.includes(column) && value === UNQUANTIZED) continue;
      const input = make("input", { type: "checkbox", checked: true, name: column, value });
      box.append(make("label", {}, input, ` ${value}`));
    }
    byId("filters").append(box);
  }
  byId("hue").value = "bits";
  if (window.innerWidth <= 900) byId("filterbox").open = false;
}

// Of a measure's evaluations the one with the most experiments is first, and shown unless another is asked for.
function listEvaluations(wanted) {
  const counts = measure.evaluations.map(() => 0);
  for (const code of measure.evaluation) counts[code]++;
  const count = (number) => `${number.toLocaleString("en")} experiment${number === 1 ? "" : "s"}`;
  const options = measure.evaluations.map((name, code) => new Option(`${name} (${count(counts[code])})`, name));
  if (options.length > 1) options.push(new Option(`all ${options.length}, which do not compare`, ""));
  byId("evaluation").replaceChildren(...options);
  byId("evaluation").value = measure.evaluations.includes(wanted) || (wanted === "" && options.length > 1) ? wanted : options[0].value;
}

function readView() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const column of Object.keys(FILTERS)) {
    const [on, off] = [asked.getAll(column), asked.getAll(`no_${column}`)];
    for (const input of document.getElementsByName(column)) {
      input.checked = on.length ? on.includes(input.value) : !off.includes(input.value);
    }
  }
  const find = (name, options, otherwise) => (options.includes(asked.get(name)) ? asked.get(name) : otherwise);
  byId("measure").value = find("measure", data.measures.map((each) => each.label), data.measures[0].label);
  byId("hue").value = find("hue", Object.keys(FILTERS), "bits");
  byId("frontier").checked = asked.get("frontier") === "1";
  byId("intervals").checked = asked.get("intervals") !== "0";
  byId("curves").checked = asked.get("curves") !== "0";
  view.sort = find("sort", Object.keys(COLUMNS), "total_bits");
  view.descending = asked.get("descending") === "1";
  view.key = asked.get("experiment");
  measure = data.measures.find((each) => each.label === byId("measure").value);
  listEvaluations(asked.get("evaluation"));
}

function writeView(key = view.key) {
  const now = new URLSearchParams({ measure: byId("measure").value, hue: byId("hue").value });
  if (byId("evaluation").selectedIndex > 0) now.set("evaluation", byId("evaluation").value);
  if (byId("frontier").checked) now.set("frontier", "1");
  if (!byId("intervals").checked) now.set("intervals", "0");
  if (!byId("curves").checked) now.set("curves", "0");
  if (view.sort !== "total_bits") now.set("sort", view.sort);
  if (view.descending) now.set("descending", "1");
  for (const column of Object.keys(FILTERS)) {
    const inputs = [...document.getElementsByName(column)];
    const [on, off] = [true, false].map((state) => inputs.filter((input) => input.checked === state));
    if (!on.length) now.append(column, "");
    else if (off.length) for (const input of on.length < off.length ? on : off) now.append(input.checked ? column : `no_${column}`, input.value);
  }
  if (key !== null) now.set("experiment", key);
  return `#${now}`;
}

function choose() {
  const on = {};
  for (const column of Object.keys(FILTERS)) {
    const { names } = data.experiments[column];
    const codes = new Map(names.map((name, code) => [name, code]));
    on[column] = [...document.getElementsByName(column)].filter((i) => i.checked).map((i) => codes.get(i.value));
  }
  const evaluation = byId("evaluation").value;
  return choosePoints(data, measure, on, evaluation === "" ? null : measure.evaluations.indexOf(evaluation));
}

function lookOf(point) {
  const { codes, looks } = data.experiments[byId("hue").value];
  return looks[codes[measure.point[point]]];
}

function findPoint(key) {
  return shown.find((point) => data.experiments.key[measure.point[point]] === key) ?? null;
}

function draw() {
  const background = document.documentElement.dataset.background;
  const hue = data.experiments[byId("hue").value];
  const groups = [...groupBy(shown, (p) => hue.codes[measure.point[p]])].sort(([a], [b]) => a - b);
  const curves = byId("curves").checked ? listCurves(data, measure, shown) : [];
  const frontiers = byId("frontier").checked ? listFrontiers(data, measure, shown) : [];
  chart.draw({
    background, frontiers,
    groups: groups.map(([code, points]) => ({ look: hue.looks[code], points })),
    curves: curves.filter(({ line }) => line.length > 1).map(({ first, line }) => ({ look: lookOf(first), line })),
    x: (p) => data.experiments.total_bits[measure.point[p]],
    y: (p) => measure.value[p], low: (p) => measure.low[p], high: (p) => measure.high[p],
    xTitle: "total model bits",
    yTitle: measure.axis + (measure.lower === null ? "" : measure.lower ? ", lower is better" : ", higher is better"),
    intervals: byId("intervals").checked, selected: findPoint(view.key), isStopped,
  });
  const of = byId("evaluation").value === "" ? measure.point.length : measure.evaluation.filter((c) => measure.evaluations[c] === byId("evaluation").value).length;
  const count = `${shown.length.toLocaleString("en")} of ${of.toLocaleString("en")} experiments shown`;
  byId("count").textContent = count;
  byId("chart").setAttribute("aria-label", `${measure.label} against total model bits: ${count}, ${curves.length} curves, ${frontiers.length} frontiers. The table below has the numbers.`);
  drawLegend(groups.map(([code]) => [hue.names[code], hue.looks[code]]), frontiers, background);
  byId("unzoom").hidden = chart.zoom === null;
}

function drawLegend(entries, frontiers, background) {
  const svg = (inner) => {
    const holder = make("span", { className: "mark" });
    holder.innerHTML = `<svg viewBox="-12 -6 24 12" width="24" height="12" aria-hidden="true">${inner}</svg>`;
    return holder;
  };
  const unit = byId("hue").value === "bits" ? "-bit" : "";
  const marks = entries.map(([name, look]) =>
    make("li", {}, svg(`<path transform="scale(4.5)" fill="${adaptColor(look.color, background)}" d="M${MARKERS[look.marker].join("L")}Z"/>`), `${name}${unit}`));
  const lines = frontiers.map(({ family, evaluation }, place) => {
    const line = svg(`<path d="M-12,0H12" stroke="currentColor" stroke-width="2" stroke-dasharray="${DASHES[place % DASHES.length]}"/>`);
    return make("li", {}, line, `Pareto frontier: ${family}${byId("evaluation").value === "" ? `, ${evaluation}` : ""}`);
  });
  byId("legend").replaceChildren(...marks, ...lines);
}

function drawTable() {
  const points = shown.slice(view.first, view.first + ROWS);
  const head = Object.entries(COLUMNS).map(([name, { title, isNumber }]) => {
    const arrow = view.sort === name ? (view.descending ? " ▼" : " ▲") : "";
    const button = make("button", { type: "button", textContent: title + arrow, onclick: () => sortBy(name) });
    const cell = make("th", { scope: "col", className: isNumber ? "number" : "" }, button);
    if (arrow) cell.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
    return cell;
  });
  const rows = points.map((point) => {
    const key = data.experiments.key[measure.point[point]];
    const cells = Object.entries(COLUMNS).map(([name, { cell, text, isNumber }]) => {
      const own = text ? text(cell(point), point) : String(cell(point));
      const content = name === "key" ? make("a", { href: writeView(key), textContent: own, onclick: showChart }) : own;
      return make("td", { className: isNumber ? "number" : "" }, content);
    });
    const row = make("tr", {}, ...cells);
    row.dataset.key = key;
    if (key === view.key) row.setAttribute("aria-current", "true");
    return row;
  });
  byId("experiments").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  const last = Math.min(view.first + ROWS, shown.length);
  byId("rows").textContent = shown.length ? `rows ${(view.first + 1).toLocaleString("en")} to ${last.toLocaleString("en")} of ${shown.length.toLocaleString("en")}` : "no rows: no experiment passes the filters";
  byId("before").disabled = view.first === 0;
  byId("after").disabled = last >= shown.length;
}

function describe(point) {
  const [low, high] = [measure.low[point], measure.high[point]];
  const text = (name) => COLUMNS[name].text(COLUMNS[name].cell(point), point);
  const [quantizer, block, method] = ["quantizer", "block_size", "method"].map((name) => nameOf(data, measure, name, point));
  return [
    nameOf(data, measure, "model", point),
    quantizer === UNQUANTIZED ? "16 bits, not quantized" : `${quantizer}, ${nameBlock(block)}, ${method}`,
    `${measure.axis}: ${formatValue(measure.value[point])}${low === null ? "" : ` (${formatValue(low)} to ${formatValue(high)})`}`,
    `${text("total_bits")} (${formatCount(COLUMNS.total_bits.cell(point) / 8, " ")}B), ${text("bits_per_param")} bits per quantized parameter`,
  ];
}

function nameBlock(name) {
  return isNaN(name) ? name : `block ${name}`;
}

function hover(point, x, y) {
  const tip = byId("tip");
  tip.hidden = point === null;
  if (point === null) return;
  const [first, ...others] = describe(point);
  tip.replaceChildren(make("b", { textContent: first }), ...others.map((line) => make("div", { textContent: line })));
  const most = byId("chart").clientWidth - tip.offsetWidth;
  tip.style.left = `${Math.max(0, Math.min(x + 14, most))}px`;
  tip.style.top = `${y > byId("chart").clientHeight / 2 ? y - tip.offsetHeight - 10 : y + 14}px`;
}

// Say below the chart which experiment is selected, and turn the table to its row.
function showSelected() {
  const point = view.key === null ? null : findPoint(view.key);
  const line = byId("selected");
  line.hidden = view.key === null;
  if (view.key === null) return;
  const clear = make("a", { href: writeView(null), textContent: "select none" });
  if (point === null) {
    line.replaceChildren(`Experiment ${view.key} is not among those shown. `, clear);
    return;
  }
  const link = make("button", { type: "button", textContent: "its row", onclick: () => findRow()?.scrollIntoView({ block: "center" }) });
  line.replaceChildren(`${describe(point).join("; ")}. `, link, " ", clear);
}

function showChart() {
  byId("chart").scrollIntoView({ block: "nearest" });
}

function findRow() {
  return byId("experiments").querySelector('[aria-current="true"]');
}

function turnToSelected() {
  const place = view.key === null ? -1 : shown.indexOf(findPoint(view.key));
  view.first = place < 0 ? 0 : Math.floor(place / ROWS) * ROWS;
}

// Scrolls the table alone: the page stays where it is, with the chart in sight.
function scrollToRow() {
  const row = findRow();
  const frame = byId("table");
  if (row) frame.scrollTop = row.offsetTop - frame.clientHeight / 2;
}

function update() {
  shown = sortPoints(choose(), (point) => COLUMNS[view.sort].cell(point), view.descending);
  turnToSelected();
  draw();
  drawTable();
  scrollToRow();
  showSelected();
}

function changeValues() {
  chart.zoom = null;
  change();
}

function change() {
  history.replaceState(null, "", writeView());
  update();
}

function sortBy(name) {
  view.descending = view.sort === name && !view.descending;
  view.sort = name;
  change();
}

function turn(rows) {
  view.first += rows;
  drawTable();
}

// A link of a row leads to its point, and a click on a point to its row: both change the address, and "back" leads back.
function select(key) {
  if (key !== view.key) location.hash = writeView(key);
}

function setTheme() {
  const theme = byId("theme").value;
  document.documentElement.style.colorScheme = theme === "system" ? "light dark" : theme;
  const isDark = theme === "dark" || (theme === "system" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.background = isDark ? "#16181d" : "#ffffff";
}

function listen() {
  for (const id of ["hue", "intervals", "curves", "frontier", "filters"]) byId(id).addEventListener("change", change);
  byId("measure").addEventListener("change", () => {
    measure = data.measures.find((each) => each.label === byId("measure").value);
    listEvaluations(null);
    changeValues();
  });
  byId("evaluation").addEventListener("change", changeValues);
  byId("reset").addEventListener("click", () => {
    for (const input of byId("filters").querySelectorAll("input")) input.checked = true;
    change();
  });
  byId("unzoom").addEventListener("click", () => {
    chart.zoom = null;
    draw();
  });
  byId("before").addEventListener("click", () => turn(-ROWS));
  byId("after").addEventListener("click", () => turn(ROWS));
  byId("theme").addEventListener("change", () => (setTheme(), draw()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (setTheme(), draw()));
  window.addEventListener("hashchange", () => (readView(), update()));
  new ResizeObserver(() => draw()).observe(byId("chart"));
  chart.listen({
    hovered: hover,
    clicked: (point) => point !== null && select(data.experiments.key[measure.point[point]]),
    zoomed: draw,
  });
}

makeControls();
setTheme();
readView();
listen();
update();
