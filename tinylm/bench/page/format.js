"use strict";
// The page's data, and how values are written. Text goes into the page as text only, never as HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const PENS = new Map(DATA.pens.map((pen) => [pen.label, pen]));

/** An element: attributes (properties where the value is a function or boolean), then children. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function" || typeof value === "boolean") node[key] = value;
    else if (value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function digits(value, count = 4, least = 1) {
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(count - 2);
  return value.toLocaleString("en-US", { maximumSignificantDigits: count, minimumSignificantDigits: least });
}

/** With the largest unit that fits: steps are [size, unit], largest first. */
function stepped(value, steps, count = 4) {
  const [size, unit] = steps.find(([size]) => Math.abs(value) >= size) ?? steps[steps.length - 1];
  return `${digits(value / size, count, count)} ${unit}`;
}

const SI = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"], [1, ""]];
const TIMES = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]];
const BYTES = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"], [1, "B"]];
const JOULES = [[1, "J"], [1e-3, "mJ"], [1e-6, "µJ"], [1e-9, "nJ"]];
const si = (unit) => (value) => stepped(value, SI.map(([size, prefix]) => [size, prefix + unit]));
const time = (value) => stepped(value, TIMES);

// By a column's kind. Kinds that are not here are text.
const FORMATS = {
  time,
  seconds: (value) => `${digits(value, 3)} s`,
  bytes: (value) => stepped(value, BYTES, 3),
  "B/s": si("B/s"),
  "FLOP/s": si("FLOP/s"),
  Hz: si("Hz"),
  "tokens/s": (value) => digits(value, 4, 4),
  share: (value) => `${digits(100 * value, 3)} %`,
  signed: (value) => `${value > 0 ? "+" : ""}${(100 * value).toFixed(2)} %`,
  error: (value) => (value === 0 ? "0" : value.toExponential(1)),
  ratio: (value) => `${digits(value)}×`,
  W: (value) => `${digits(value, 3)} W`,
  J: (value) => stepped(value, JOULES),
  "°C": (value) => `${digits(value, 3)} °C`,
  count: (value) => value.toLocaleString("en-US"),
  number: (value) => digits(value, 3),
  span: ([low, high]) => `${time(low)} – ${time(high)}`,
  ratios: ([low, high]) => `${digits(low)} – ${digits(high)}`,
};

/** A cell's text: empty where the column does not apply, a dash where the machine could not tell. */
function words(value, kind) {
  if (value === null) return "";
  if (value === false) return "–";
  if (FORMATS[kind]) return FORMATS[kind](value);
  return String(value);
}

/** What a cell is sorted by; a range by its width against its place. */
function sortKey(value) {
  if (value === null || value === false) return null;
  return Array.isArray(value) ? (value[1] - value[0]) / (Math.abs(value[0]) || 1) : value;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}
