// Charts by their form: each gives Plotly's traces and layout for the choice that the reader made.

const HEIGHT = 400;

/** Rows as objects, and those of one choice of facets. */
function records(spec) {
  spec.records ??= spec.points.map((row) => Object.fromEntries(spec.columns.map((key, i) => [key, row[i]])));
  return spec.records;
}
const chosen = (spec, choice) => records(spec).filter((r) => spec.facets.every(({ key }) => r[key] === choice[key]));
const unique = (values) => [...new Set(values)];

function valueAxis(spec, rows) {
  const [{ quantity, unit }] = rows;
  const reference = spec.reference[quantity];
  const ends = [...rows.flatMap((r) => [r.low, r.high]), ...(reference === undefined ? [] : [reference])];
  const [low, high] = [Math.min(...ends), Math.max(...ends)];
  const log = low > 0 && (spec.log.includes(quantity) || (high >= spec.span * low && !spec.linear.includes(quantity)));
  const title = `${spec.measure || quantity}${unit === "×" ? "" : ` (${unit})`}`;
  return { log, reference, title, scale: log ? logarithmic(ends) : { rangemode: "tozero", tickformat: format(high) } };
}

function error(rows) {
  return {
    type: "data", symmetric: false, thickness: 1.2, width: 3, visible: rows.some((r) => r.high > r.low),
    array: rows.map((r) => r.high - r.value), arrayminus: rows.map((r) => r.value - r.low),
  };
}

const pattern = (shape) => ({ shape, fillmode: "overlay", fgcolor: variable("surface"), fgopacity: 0.9, size: 7, solidity: 0.3 });

function told(spec, r, styles) {
  const parts = [spec.x && `${spec.x} ${r[spec.x]}`, ...spec.categories.map((key) => spec.words[key][r[key]])].filter(Boolean);
  if (spec.columns.includes("rows") && r.rows) parts.push(`${r.rows} rows`);
  const style = styles.find(({ value }) => value === r[spec.style]);
  const unit = r.unit === "×" ? "×" : ` ${r.unit}`;
  const spread = r.spread ? `<br>${plain(r.spread)}: ${digits(r.low)} – ${digits(r.high)}` : "";
  return `<b>${plain(r.label)}</b> ${plain(style ? style.text : "")}<br>${plain(parts.join(" · "))}<br>${plain(r.quantity)} ${digits(r.value)}${unit}${spread}`;
}

function across(value, vertical) {
  const line = { color: variable("muted"), width: 1, dash: "dash" };
  const along = vertical ? { x0: value, x1: value, yref: "paper", y0: 0, y1: 1 } : { y0: value, y1: value, xref: "paper", x0: 0, x1: 1 };
  return { type: "line", layer: "below", line, ...along };
}

function lines(spec, choice) {
  const rows = chosen(spec, choice);
  const styles = spec.styles.length ? spec.styles : [{ value: undefined, text: "", dash: "", line: true, marks: true }];
  const traces = [];
  for (const pen of PENS.values()) {
    for (const style of styles) {
      const part = rows.filter((r) => r.label === pen.label && (!spec.style || r[spec.style] === style.value));
      if (!part.length) continue;
      part.sort((a, b) => a[spec.x] - b[spec.x]);
      const { symbol } = style.pen ?? pen;
      const paint = colour(style.pen ?? pen);
      const joined = part.filter((r) => Number(r[spec.x]) % spec.step === 0);
      for (const own of [joined, part.filter((r) => !joined.includes(r))].filter((rows) => rows.length)) {
        const line = style.line && own === joined;
        const marks = style.marks || own.length === 1;
        const name = plain([style.pen ? "" : pen.label, style.text].filter(Boolean).join(", "));
        traces.push({
          type: "scatter",
          mode: [line && "lines", marks && "markers"].filter(Boolean).join("+"),
          name, legendgroup: name, showlegend: own === joined || !joined.length,
          x: own.map((r) => Number(r[spec.x])), y: own.map((r) => r.value),
          line: { color: paint, width: style.marks ? 2 : 1.4, dash: style.dash || pen.dash },
          marker: { color: paint, symbol: !style.line ? "x-thin" : line ? symbol : `${symbol}-open`, size: style.line ? 8 : 13, line: { color: paint, width: line ? 0 : style.line ? 2 : 3 } },
          error_y: { ...error(own), visible: style.marks && style.line && own.some((r) => r.high > r.low) },
          text: own.map((r) => told(spec, r, styles)), hovertemplate: "%{text}<extra></extra>",
        });
      }
    }
  }
  const ticks = unique(rows.map((r) => Number(r[spec.x]))).sort((a, b) => a - b);
  // As many as there is room for, the last among them.
  const apart = 0.999 * Math.log(ticks.at(-1) / ticks[0]) / (narrow() ? 5 : 11);
  const kept = ticks.reduceRight((found, x) => (found.length && Math.log(found[0] / x) < apart ? found : [x, ...found]), []);
  const { log, reference, title, scale } = valueAxis(spec, rows);
  const xaxis = axis(spec.x_title, { type: "log", tickvals: kept, ticktext: kept.map((value) => value.toLocaleString("en-US")), tickangle: 0 });
  return { traces, layout: { height: HEIGHT + 18 * traces.length * narrow(), xaxis, yaxis: axis(title + (log ? ", log scale" : ""), scale), shapes: reference === undefined ? [] : [across(reference)] } };
}

function bars(spec, choice) {
  const rows = chosen(spec, choice);
  const telling = spec.categories.filter((key, i) => unique(rows.map((r) => r[key])).length > 1 || (i === 0 && rows.length === 1));
  const place = (r) => telling.map((key) => plain(spec.words[key][r[key]])).join(narrow() ? "<br>" : " · ");
  const { log, reference, title, scale } = valueAxis(spec, rows);
  const dots = log || spec.form === "dots"; // bars compare by length, which a logarithm has not
  const styles = spec.styles.length ? spec.styles : [{ value: undefined, text: "", pattern: "" }];
  const traces = [];
  for (const pen of PENS.values()) {
    for (const style of styles) {
      const part = rows.filter((r) => r.label === pen.label && (!spec.style || r[spec.style] === style.value));
      if (!part.length) continue;
      const shared = {
        name: plain([pen.label, style.text].filter(Boolean).join(", ")), x: part.map((r) => r.value), y: part.map(place), error_x: error(part),
        hovertext: part.map((r) => told(spec, r, styles)), hovertemplate: "%{hovertext}<extra></extra>",
      };
      // Spaces, so that the value stands clear of the error bar.
      const values = part.map((r) => `\u2002\u2002${digits(r.value, 3)}${r.unit === "×" ? "×" : ""}`);
      if (dots) traces.push({ ...shared, type: "scatter", mode: "markers", marker: { color: colour(pen), symbol: pen.symbol, size: 10 } });
      else traces.push({ ...shared, type: "bar", orientation: "h", text: values, textposition: "outside", cliponaxis: false, marker: { color: colour(pen), pattern: pattern(style.pattern) } });
    }
  }
  const places = unique(rows.map(place));
  const per = (dots ? 24 : 14 + 20 * traces.length) + (narrow() ? 15 * Math.max(0, telling.length - 1) : 0);
  const yaxis = axis("", { type: "category", categoryorder: "array", categoryarray: places, autorange: "reversed", ticklabelstandoff: 6 });
  // Room for the value at the end of the longest bar.
  if (!dots) scale.range = [0, Math.max(...rows.map((r) => r.high)) * (narrow() ? 1.35 : 1.12)];
  const height = Math.max(180, 120 + per * places.length);
  return { traces, layout: { height, barmode: "group", bargap: 0.25, xaxis: axis(title + (log ? ", log scale" : ""), scale), yaxis, shapes: reference === undefined ? [] : [across(reference, true)] } };
}

/** All cells of the experiments' tables that have a value in this column, as objects. */
function cells(needed) {
  return Object.values(DATA.tables).filter(({ name }) => name.startsWith("cells-")).flatMap((table) => {
    const at = Object.fromEntries(table.columns.map(({ key }, i) => [key, i]));
    if (at[needed] === undefined) return [];
    return table.rows.map((row, i) => {
      const get = (key) => (at[key] === undefined ? table.common[key] ?? null : row[at[key]]);
      return { get, label: row[at.label], cell: row[at.cell], experiment: table.name.slice(6), dtype: get("dtype"), place: i };
    }).filter((line) => typeof line.get(needed) === "number");
  });
}

/** Tops so near to each other that their names would meet get one name. */
function together(dtypes) {
  const found = [];
  for (const [dtype, top] of [...dtypes].sort((a, b) => b[1] - a[1])) {
    const last = found[found.length - 1];
    const text = narrow() ? `${dtype} ${short(top)}` : `${dtype} ${stepped(top, SI, 3)}FLOP/s`;
    if (last && last.top < 2 * top) last.text += `, ${text}`;
    else found.push({ top, text });
  }
  return found;
}

function roofline(spec, choice) {
  const all = cells("intensity").filter((c) => typeof c.get("flops_per_s") === "number");
  const kept = all.filter((c) => ["experiment", "dtype"].every((key) => choice[key] === "all" || c[key] === choice[key]));
  const x = all.map((c) => c.get("intensity"));
  const tops = spec.roofs.flatMap(({ flops }) => Object.values(flops));
  const [left, right] = [Math.min(...x) / 2, Math.max(...x, ...spec.roofs.flatMap((r) => Object.values(r.flops).map((top) => top / r.bytes))) * 3];
  const traces = [];
  for (const roof of spec.roofs) {
    const pen = PENS.get(roof.label);
    const dtypes = Object.entries(roof.flops).filter(([dtype]) => choice.dtype === "all" || choice.dtype === dtype);
    const line = (xs, bandwidth, top, dash, width, name) => traces.push({
      type: "scatter", mode: "lines", showlegend: false, x: xs, y: xs.map((v) => Math.min(v * bandwidth, top)),
      line: { color: colour(pen), dash, width }, name: plain(name), hovertemplate: `${plain(name)}<extra></extra>`,
    });
    for (const [dtype, top] of dtypes) {
      line([left, top / roof.bytes, right], roof.bytes, top, "solid", 1.6, `${roof.label}, ${dtype}: ${si("FLOP/s")(top)}, copy ${si("B/s")(roof.bytes)}`);
      if (roof.read > roof.bytes) line([left, top / roof.read], roof.read, top, "dot", 1.3, `${roof.label}: reading alone ${si("B/s")(roof.read)}`);
    }
    if (!dtypes.length) line([left, right], roof.bytes, Infinity, "solid", 1.6, `${roof.label}: copy ${si("B/s")(roof.bytes)}`);
    const named = together(dtypes);
    traces.push({
      type: "scatter", mode: "text", showlegend: false, hoverinfo: "skip", textposition: "top left", textfont: { color: variable("text"), size: 11.5 },
      x: named.map(() => right), y: named.map(({ top }) => top), text: named.map(({ text }) => plain(`${roof.label} ${text}`)),
    });
    const part = kept.filter((c) => c.label === roof.label);
    traces.push({
      type: "scatter", mode: "markers", name: plain(roof.label), x: part.map((c) => c.get("intensity")), y: part.map((c) => c.get("flops_per_s")),
      marker: { color: colour(pen), symbol: pen.symbol, size: 8, opacity: 0.85, line: { color: variable("surface"), width: 0.8 } },
      text: part.map((c) => `<b>${plain(c.label)}</b> ${plain(c.cell)}<br>${digits(c.get("intensity"), 3)} FLOP/byte, ${si("FLOP/s")(c.get("flops_per_s"))}<br>${words(c.get("of_ceiling"), "share")} of its ceiling`),
      hovertemplate: "%{text}<extra></extra>",
    });
  }
  const y = all.map((c) => c.get("flops_per_s"));
  return { traces, layout: {
    height: narrow() ? 460 : 540,
    xaxis: axis(narrow() ? "FLOP/byte, log scale" : "operational intensity (FLOP/byte), log scale", { ...logarithmic([left, right]), range: [Math.log10(left), Math.log10(right)] }),
    yaxis: axis("achieved (FLOP/s), log scale", logarithmic([...y, ...tops.map((top) => top * 1.6)])),
  } };
}

function telemetry(spec, choice) {
  const [key, title, scale] = spec.readings.find(([key]) => key === choice.reading);
  const traces = [];
  const starts = new Map();
  let width = 0;
  for (const experiment of unique(cells(key).map((c) => c.experiment))) {
    starts.set(experiment, width);
    width += DATA.tables[`cells-${experiment}`].rows.length;
  }
  for (const pen of PENS.values()) {
    const part = cells(key).filter((c) => c.label === pen.label);
    if (!part.length) continue;
    traces.push({
      type: "scatter", mode: "markers", name: plain(pen.label), x: part.map((c) => starts.get(c.experiment) + c.place), y: part.map((c) => c.get(key) * scale),
      marker: { color: colour(pen), symbol: pen.symbol, size: 6 },
      text: part.map((c) => `<b>${plain(c.label)}</b> ${plain(c.cell)}<br>${plain(title)}: ${digits(c.get(key) * scale)}<br>throttling: ${plain(c.get("throttle") || "none recorded")}`),
      hovertemplate: "%{text}<extra></extra>",
    });
  }
  const xaxis = axis("cells, experiment by experiment", { range: [-0.01 * width, 1.01 * width], tickvals: [...starts.values()], ticktext: [...starts.keys()].map(plain), ...(narrow() ? { tickangle: 90 } : { tickangle: 0, ticklabelposition: "outside right" }) });
  return { traces, layout: { height: HEIGHT, xaxis, yaxis: axis(title, { tickformat: ".4~g" }) } };
}

function ranks(spec) {
  const traces = [...PENS.values()].map((pen) => {
    const part = spec.points.map((p, i) => ({ ...p, i: i + 1 })).filter((p) => p.label === pen.label);
    return {
      type: "scatter", mode: "markers", name: plain(pen.label), x: part.map((p) => p.i), y: part.map((p) => p.ratio),
      error_y: error(part.map((p) => ({ value: p.ratio, low: p.ends ? p.ends[0] : p.ratio, high: p.ends ? p.ends[1] : p.ratio }))),
      marker: { color: colour(pen), symbol: pen.symbol, size: 8 },
      text: part.map((p) => `<b>${plain(p.label)}</b> ${plain(p.cell)}<br>${digits(p.ratio)}×, ${plain(p.verdict)}`), hovertemplate: "%{text}<extra></extra>",
    };
  }).filter((trace) => trace.x.length);
  const scale = logarithmic([...spec.points.flatMap((p) => p.ends ?? [p.ratio]), 1]);
  const xaxis = axis("comparisons, from the fastest", { tickformat: "d" });
  return { traces, layout: { height: HEIGHT, xaxis, yaxis: axis("own time over the other’s, log scale", scale), shapes: [across(1)] } };
}

function calibration(spec) {
  const pen = PENS.get(spec.label);
  const symbols = { cold: "circle", graph: "square-open", hot: "x-thin-open" };
  const traces = unique(spec.points.map((p) => p.mode)).map((mode) => {
    const part = spec.points.filter((p) => p.mode === mode);
    return {
      type: "scatter", mode: "markers", name: mode, x: part.map((p) => p.ncu_s * 1e6), y: part.map((p) => 100 * p.off),
      marker: { color: colour(pen), symbol: symbols[mode], size: 9, line: { color: colour(pen), width: 2 } },
      text: part.map((p) => `<b>${mode}</b> ${plain(p.kernel)}<br>Nsight Compute ${time(p.ncu_s)}<br>off by ${FORMATS.signed(p.off)}`), hovertemplate: "%{text}<extra></extra>",
    };
  });
  const x = spec.points.map((p) => p.ncu_s * 1e6);
  const { share, from_s: from, within_s: within } = spec.gate;
  const places = Array.from({ length: 60 }, (_, i) => Math.min(...x) * (Math.max(...x) / Math.min(...x)) ** (i / 59));
  for (const sign of [1, -1]) {
    traces.push({
      type: "scatter", mode: "lines", name: "gate", showlegend: sign > 0, hoverinfo: "skip", x: places,
      y: places.map((us) => sign * 100 * (us >= from * 1e6 ? share : within * 1e6 / us)), line: { color: variable("muted"), width: 1.2, dash: "dash" },
    });
  }
  return { traces, layout: { height: HEIGHT, xaxis: axis("Nsight Compute (µs), log scale", logarithmic(x)), yaxis: axis("off by (%)", { zeroline: true, tickformat: ".3~g" }) } };
}

function stack(spec) {
  const place = (row) => plain(`${row.label} ${row.run}`).replaceAll(" ", narrow() ? "<br>" : " ");
  const traces = spec.phases.map(([phase, shade]) => ({
    type: "bar", orientation: "h", name: plain(phase.replaceAll("_", " ")), x: spec.rows.map((r) => r.phases[phase] ?? 0), y: spec.rows.map(place),
    marker: { color: shade, line: { color: variable("control"), width: 1 } }, hovertemplate: `${plain(phase)}: %{x:.1f} s<extra></extra>`,
  }));
  const yaxis = axis("", { autorange: "reversed", type: "category", ticklabelstandoff: 6 });
  return { traces, layout: { height: 170 + 20 * spec.phases.length * narrow() + 42 * spec.rows.length, barmode: "stack", xaxis: axis("seconds"), yaxis } };
}

const FORMS = { lines, bars, dots: bars, roofline, telemetry, ranks, calibration, stack };
