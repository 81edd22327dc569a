// Plotly: unpacked from the page when the first chart is near, and dressed in the page's colours.

const DARK = matchMedia("(prefers-color-scheme: dark)");
const COARSE = matchMedia("(pointer: coarse)");
let printing = false;
let unpacking = null;

function library() {
  unpacking ??= (async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    document.head.append(el("script", {}, await new Response(stream).text()));
  })();
  return unpacking;
}

const narrow = () => innerWidth < 600;
const shade = () => (DARK.matches && !printing ? "dark" : "light");
const colour = (pen) => pen[shade()];
const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
/** Plotly reads some HTML in texts: data must not be taken for it. */
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function axis(title, more = {}) {
  const line = printing ? "#bbbbbb" : variable("line");
  const grid = printing ? "#dddddd" : variable("grid");
  return { title: { text: plain(title), standoff: 8, font: { size: narrow() ? 11.5 : 13 } }, gridcolor: grid, linecolor: line, zerolinecolor: line, automargin: true, ...more };
}

/** Ticks at 1, 2 and 5 of each decade, or at 1 only, written short. */
function logarithmic(values, ends = []) {
  const all = [...values, ...ends].filter((value) => value > 0);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const decades = Math.log10(high / low);
  const steps = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.ceil(Math.log10(high)); power++) {
    ticks.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(3))));
  }
  const room = Math.max(0.01, decades * 0.06);
  const range = [Math.log10(low) - room, Math.log10(high) + room];
  // Within a small span Plotly's own ticks are finer.
  return decades < 0.5 ? { type: "log", nticks: 7, tickformat: format(high), range } : { type: "log", tickvals: ticks, ticktext: ticks.map(short), range };
}

/** Plotly's format: SI prefixes for large values, and never m for thousandths. */
const format = (high) => (high >= 1000 ? ".3~s" : ".3~g");

function short(value) {
  const [size, suffix] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([size]) => Math.abs(value) >= size) ?? [1, ""];
  return `${digits(value / size, 3)}${suffix}`;
}

function layout(more) {
  const text = printing ? "#000000" : variable("text");
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: text },
    margin: { l: 8, r: 12, t: 8, b: 8 },
    showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, bgcolor: "rgba(0,0,0,0)", traceorder: "normal" },
    hoverlabel: { bgcolor: printing ? "#ffffff" : variable("raised"), bordercolor: variable("control"), font: { color: text }, align: "left" },
    hovermode: "closest",
    // Dragging on a touch screen is for the page.
    dragmode: COARSE.matches ? false : "zoom",
    ...more,
  };
}

const CONFIG = { responsive: true, displaylogo: false, displayModeBar: COARSE.matches ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
