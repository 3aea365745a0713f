// Which points are shown, in which groups and in which order. Nothing here knows the document, so that tests run this
// file by itself.
//
// data.experiments has a column of names with codes for each filter, and plain columns. A measure has a list for each of
// point (the place of the experiment), evaluation (a code), value, low and high. A point is a place in these lists.
"use strict";

// An unquantized model belongs to every data type, block size and method.
const OF_QUANTIZERS = ["method", "data_type", "block_size"];
const UNQUANTIZED = "unquantized";
const PREFIXES = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

function nameOf(data, measure, column, point) {
  const { names, codes } = data.experiments[column];
  return names[codes[measure.point[point]]];
}

// Places of the points that pass every filter. shown[column] lists the codes that are on. evaluation is a code, or null.
function choosePoints(data, measure, shown, evaluation) {
  const filters = Object.entries(shown).map(([column, codes]) => {
    const { names, codes: all } = data.experiments[column];
    const allowed = names.map((name) => OF_QUANTIZERS.includes(column) && name === UNQUANTIZED);
    for (const code of codes) allowed[code] = true;
    return { all, allowed };
  });
  const chosen = [];
  for (let point = 0; point < measure.point.length; point++) {
    const place = measure.point[point];
    if (evaluation !== null && measure.evaluation[point] !== evaluation) continue;
    if (filters.every(({ all, allowed }) => allowed[all[place]])) chosen.push(point);
  }
  return chosen;
}

function groupBy(points, name) {
  const groups = new Map();
  for (const point of points) {
    const own = name(point);
    const group = groups.get(own);
    if (group) group.push(point);
    else groups.set(own, [point]);
  }
  return groups;
}

// Lines through the points of one variant, precision and evaluation, as [total bits, value] in order of size. Repeats of
// one size, such as seeds, count as their mean.
function listCurves(data, measure, points) {
  const evaluations = measure.evaluations.length;
  const groups = groupBy(points, (p) => data.experiments.curve[measure.point[p]] * evaluations + measure.evaluation[p]);
  return [...groups.values()].map((members) => {
    const sizes = groupBy(members, (p) => data.experiments.total_bits[measure.point[p]]);
    const means = [...sizes].map(([size, own]) => [size, own.reduce((sum, p) => sum + measure.value[p], 0) / own.length]);
    return { first: members[0], line: means.sort((a, b) => a[0] - b[0]) };
  });
}

// Points that no other of them beats: no more bits and at least as good.
function findFrontier(data, measure, points) {
  const sign = measure.lower ? -1 : 1;
  const size = (p) => data.experiments.total_bits[measure.point[p]];
  const ordered = [...points].sort((a, b) => size(a) - size(b) || sign * (measure.value[b] - measure.value[a]));
  let best = -Infinity;
  return ordered.filter((p) => sign * measure.value[p] > best && ((best = sign * measure.value[p]), true));
}

// One frontier for each family and evaluation: values of two families, or measured in two ways, do not compare.
function listFrontiers(data, measure, points) {
  if (measure.lower === null) return [];
  const evaluations = measure.evaluations.length;
  const { codes, names } = data.experiments.family;
  const fields = groupBy(points, (p) => codes[measure.point[p]] * evaluations + measure.evaluation[p]);
  return [...fields].sort(([a], [b]) => a - b).map(([field, members]) => ({
    family: names[Math.floor(field / evaluations)],
    evaluation: measure.evaluations[field % evaluations],
    points: findFrontier(data, measure, members),
  }));
}

// Numbers before texts, missing ones last whichever way is sorted. Equal ones keep their order.
function compareCells(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a === "number" || typeof b === "number") return typeof a === "number" ? -1 : 1;
  return a < b ? -1 : a > b ? 1 : 0;
}

function sortPoints(points, cellOf, descending) {
  const sign = descending ? -1 : 1;
  const cells = new Map(points.map((point) => [point, cellOf(point)]));
  return [...points].sort((p, q) => {
    const [a, b] = [cells.get(p), cells.get(q)];
    if (a === null || b === null) return (a === null) - (b === null);
    return sign * compareCells(a, b);
  });
}

// Places on an axis, at most so many: 1, 2 and 5 times powers of ten, or more digits, or equal steps.
function listTicks(low, high, most, isLog) {
  for (const digits of isLog ? [[1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8]] : []) {
    const ticks = listLogTicks(low, high, most, digits);
    if (ticks.length >= 3) return ticks;
  }
  const rough = (high - low) / Math.max(most, 1);
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => unit * factor >= rough * (1 - 1e-9));
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

function listLogTicks(low, high, most, digits) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of digits) ticks.push({ digit, tick: Number(`${digit}e${power}`) });
  }
  const inside = ticks.filter(({ tick }) => tick >= low && tick <= high);
  const powers = inside.filter(({ digit }) => digit === 1);
  let kept = inside.length > most && powers.length >= 3 ? powers : inside;
  while (kept.length > most && kept.length > 2) kept = kept.filter((_, place) => place % 2 === 0);
  return kept.map(({ tick }) => tick);
}

// 2500000 as 2.5M, or with a gap as "2.5 M"
function formatCount(number, gap = "") {
  const [size, prefix] = PREFIXES.find(([least]) => Math.abs(number) >= least) || [1, ""];
  return `${Number((number / size).toPrecision(3))}${gap}${prefix}`;
}

// Four digits after the point, or three that count for what is small.
function formatValue(number) {
  if (number === null) return "-";
  const size = Math.abs(number);
  return size >= 0.1 || size === 0 ? number.toFixed(size >= 1000 ? 1 : 4) : String(Number(number.toPrecision(3)));
}

// A figure's colour as it is on white, and lighter on a dark background: until their contrast is 4.5 to 1.
function adaptColor(color, background) {
  const parse = (text) => [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
  const linear = (c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = (rgb) => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]); // WCAG 2
  const [own, behind] = [parse(color), luminance(parse(background))];
  if (behind > 0.2) return color;
  for (let share = 0; ; share += 0.05) {
    const mixed = own.map((c) => Math.round(c + (255 - c) * Math.min(share, 1)));
    if ((luminance(mixed) + 0.05) / (behind + 0.05) >= 4.5 || share >= 1) {
      return `#${mixed.map((c) => c.toString(16).padStart(2, "0")).join("")}`;
    }
  }
}
