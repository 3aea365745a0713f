// The report's own script: filters, hover, Pareto frontier. The view is kept in the address (#data_type=nf&pareto=1), so that
// a link shows what its sender saw.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const points = data.points;
const count = points.key.length;
const FILTERS = { family: "family", method: "method", data_type: "data type", block_size: "block size", bits: "bits" };
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A7A1F", "#5D3A9B", "#000000"];
const SYMBOLS = ["circle", "triangle-down", "triangle-up", "diamond", "square", "cross", "x", "pentagon", "star", "hexagon"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const MANY = 3000; // more points than this are drawn by WebGL

const byId = (id) => document.getElementById(id);
const asText = (value) => String(value);
const inOrder = (a, b) => (isNaN(a) || isNaN(b) ? (isNaN(a) - isNaN(b)) || (a < b ? -1 : 1) : a - b);

function distinct(column) {
  return [...new Set(points[column].map(asText))].sort(inOrder);
}

function makeFilters() {
  for (const [column, title] of Object.entries(FILTERS)) {
    const box = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = title;
    box.append(legend);
    for (const value of distinct(column)) {
      const label = document.createElement("label");
      const input = document.createElement("input");
      Object.assign(input, { type: "checkbox", checked: true, name: column, value });
      label.append(input, ` ${value}`);
      box.append(label);
    }
    byId("filters").append(box);
  }
  for (const measure of data.measures) byId("measure").append(new Option(measure.label, measure.label));
}

function readView() {
  const view = new URLSearchParams(location.hash.slice(1));
  for (const column of Object.keys(FILTERS)) {
    const wanted = view.getAll(column);
    for (const input of document.getElementsByName(column)) input.checked = !wanted.length || wanted.includes(input.value);
  }
  if (view.has("measure")) byId("measure").value = view.get("measure");
  if (view.has("hue")) byId("hue").value = view.get("hue");
  byId("pareto").checked = view.get("pareto") === "1";
}

function writeView() {
  const view = new URLSearchParams({ measure: byId("measure").value, hue: byId("hue").value });
  if (byId("pareto").checked) view.set("pareto", "1");
  for (const column of Object.keys(FILTERS)) {
    const inputs = [...document.getElementsByName(column)];
    if (inputs.some((input) => !input.checked)) {
      for (const input of inputs) if (input.checked) view.append(column, input.value);
    }
  }
  history.replaceState(null, "", `#${view}`);
}

const OF_QUANTIZERS = ["method", "data_type", "block_size"];

// Indices of the points that pass every filter. An unquantized model belongs to every data type, block size and method.
function choose() {
  const allowed = {};
  for (const column of Object.keys(FILTERS)) {
    allowed[column] = new Set([...document.getElementsByName(column)].filter((i) => i.checked).map((i) => i.value));
  }
  const measure = byId("measure").value;
  const chosen = [];
  for (let i = 0; i < count; i++) {
    if (points.measure[i] !== measure || points.value[i] === null) continue;
    const asked = Object.keys(FILTERS).filter((column) => points.bits[i] !== 16 || !OF_QUANTIZERS.includes(column));
    if (asked.every((column) => allowed[column].has(asText(points[column][i])))) chosen.push(i);
  }
  return chosen;
}

// Plotly reads texts as a kind of HTML: names are escaped.
const escapeText = (text) =>
  String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");

function describe(i) {
  const interval = points.low[i] === null ? "" : ` (${points.low[i].toFixed(4)} to ${points.high[i].toFixed(4)})`;
  const block = points.bits[i] === 16 ? "" : `, block ${points.block_size[i]}, method ${escapeText(points.method[i])}`;
  return [
    `<b>${escapeText(points.model[i])}</b> ${points.bits[i]}-bit ${escapeText(points.data_type[i])}${block}`,
    `${points.value[i].toFixed(4)}${interval}`,
    `${(points.total_bits[i] / 1e6).toPrecision(4)} Mbit, ${points.bits_per_param[i].toFixed(3)} bits per quantized parameter`,
    `experiment ${escapeText(points.key[i])}; ${points.evaluation ? escapeText(points.evaluation[i]) : ""}`,
  ].join("<br>");
}

// What a point's value compares with: models of the same family, measured in the same way.
const nameField = (i) => [points.family[i], ...(points.evaluation ? [points.evaluation[i]] : [])].join(", ");

function groupBy(members, name) {
  const groups = new Map();
  for (const i of members) {
    if (!groups.has(name(i))) groups.set(name(i), []);
    groups.get(name(i)).push(i);
  }
  return groups;
}

// Points of one field that no other beats: no more bits and at least as good.
function frontier(chosen, lower) {
  const sign = lower ? -1 : 1;
  const ordered = [...chosen].sort((a, b) => points.total_bits[a] - points.total_bits[b] || sign * (points.value[b] - points.value[a]));
  let best = -Infinity;
  return ordered.filter((i) => sign * points.value[i] > best && ((best = sign * points.value[i]), true));
}

function makeTrace(name, members, place, hue) {
  const style = (hue === "bits" && data.styles[name]) || {
    color: COLORS[place % COLORS.length],
    symbol: SYMBOLS[place % SYMBOLS.length],
  };
  const known = members.every((i) => points.low[i] !== null);
  return {
    type: members.length > MANY ? "scattergl" : "scatter",
    mode: "markers",
    name: hue === "bits" ? `${name}-bit` : escapeText(name),
    x: members.map((i) => points.total_bits[i]),
    y: members.map((i) => points.value[i]),
    text: members.map(describe),
    hoverinfo: "text",
    marker: { size: 9, color: style.color, symbol: style.symbol, line: { width: 0.5, color: "white" } },
    error_y: {
      visible: known && byId("intervals").checked,
      type: "data",
      symmetric: false,
      array: members.map((i) => points.high[i] - points.value[i]),
      arrayminus: members.map((i) => points.value[i] - points.low[i]),
      thickness: 0.8,
      width: 0,
    },
  };
}

function draw() {
  const measure = data.measures.find((m) => m.label === byId("measure").value);
  const hue = byId("hue").value;
  const chosen = choose();
  const groups = groupBy(chosen, (i) => asText(points[hue][i]));
  const names = [...groups.keys()].sort(inOrder);
  const traces = names.map((name, place) => makeTrace(name, groups.get(name), place, hue));
  if (byId("pareto").checked) {
    const fields = [...groupBy(chosen, nameField)].sort(([a], [b]) => inOrder(a, b));
    fields.forEach(([field, members], place) => {
      const best = frontier(members, measure.lower);
      traces.push({
        type: "scatter", mode: "lines", name: `Pareto frontier: ${escapeText(field)}`, hoverinfo: "skip",
        line: { color: "#444", width: 2, shape: "hv", dash: DASHES[place % DASHES.length] },
        x: best.map((i) => points.total_bits[i]), y: best.map((i) => points.value[i]),
      });
    });
  }
  const layout = {
    xaxis: { title: { text: "total model bits" }, type: "log", dtick: "D2", exponentformat: "SI" },
    yaxis: { title: { text: `${escapeText(measure.label)} (${measure.lower ? "lower" : "higher"} is better)` } },
    font: { size: 14 }, margin: { t: 20, r: 20 }, hovermode: "closest", legend: { title: { text: byId("hue").selectedOptions[0].text } },
  };
  Plotly.react("plot", traces, layout, { responsive: true, displaylogo: false });
  const total = points.measure.filter((m) => m === measure.label).length;
  byId("count").textContent = `${chosen.length} of ${total} experiments shown`;
}

function update() {
  writeView();
  draw();
}

makeFilters();
readView();
draw();
document.body.addEventListener("change", update);
byId("reset").addEventListener("click", () => {
  for (const column of Object.keys(FILTERS)) for (const input of document.getElementsByName(column)) input.checked = true;
  update();
});
window.addEventListener("hashchange", () => {
  readView();
  draw();
});
