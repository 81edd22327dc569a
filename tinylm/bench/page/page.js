// Puts tables and charts into the page; charts when they come near, and again when colours change.

/** The choices that a chart offers: [{key, values: [[value, text]]}], and those it starts with. */
function offered(spec) {
  if (spec.form === "roofline") {
    const all = cells("intensity");
    const facets = ["experiment", "dtype"].map((key) => ({ key, values: ["all", ...unique(all.map((c) => c[key]).filter(Boolean))].map((v) => [v, v]) }));
    return [facets.filter(({ values }) => values.length > 2), { experiment: "all", dtype: "all" }];
  }
  if (spec.form === "telemetry") {
    return [[{ key: "reading", values: spec.readings.map(([key, title]) => [key, title]) }], { reading: spec.readings[0][0] }];
  }
  return [spec.facets ?? [], { ...spec.start }];
}

/** After a choice that has no data: the combination that keeps it, and as much of the rest as there is. */
function mend(spec, choice, key) {
  if (!spec.points || !spec.facets || chosen(spec, choice).length) return;
  const kept = (r) => spec.facets.filter((facet) => r[facet.key] === choice[facet.key]).length;
  const best = records(spec).filter((r) => r[key] === choice[key]).sort((a, b) => kept(b) - kept(a))[0];
  spec.facets.forEach((facet) => { choice[facet.key] = best[facet.key]; });
}

function chart(box) {
  const spec = DATA.charts[box.dataset.chart];
  const [facets, choice] = offered(spec);
  const plot = el("div", { class: "plot", role: "group", "aria-label": `Chart: ${box.dataset.title}`, "aria-describedby": box.dataset.caption });
  const controls = el("form", { class: "controls", "aria-label": `Choose what is shown: ${box.dataset.title}`, onsubmit: () => false });
  const selects = facets.map(({ key, values }) => {
    const select = el("select", { id: `${box.dataset.chart}-${key}` }, ...values.map(([value, text]) => el("option", { value }, text)));
    select.onchange = () => {
      choice[key] = select.value;
      mend(spec, choice, key);
      draw();
    };
    controls.append(el("label", {}, key, select));
    return [key, select];
  });
  box.replaceChildren(...(facets.length ? [controls] : []), plot);

  function draw() {
    selects.forEach(([key, select]) => { select.value = choice[key]; });
    const { traces, layout: wanted } = FORMS[spec.form](spec, choice);
    plot.style.minHeight = `${wanted.height}px`;
    return Plotly.react(plot, traces, layout(wanted), CONFIG);
  }
  return draw;
}

function start() {
  document.querySelectorAll(".sheet").forEach(sheet);
  document.querySelectorAll("details.picture").forEach((details) => { details.open = false; });
  if (narrow()) document.querySelector("nav details").open = false;

  const waiting = new Map();
  const drawn = new Map();
  async function draw(box) {
    if (!waiting.delete(box)) return;
    try {
      await library();
      drawn.set(box, chart(box));
      await drawn.get(box)();
      box.dataset.drawn = "yes";
    } catch (problem) {
      box.replaceChildren(el("p", { class: "absent" }, `This chart could not be drawn here (${problem.message}); what it shows is said below.`));
    }
  }
  const near = new IntersectionObserver((entries) => {
    entries.filter((entry) => entry.isIntersecting).forEach((entry) => { near.unobserve(entry.target); draw(entry.target); });
  }, { rootMargin: "600px" });
  document.querySelectorAll(".chart").forEach((box) => { waiting.set(box, true); near.observe(box); });

  const again = () => drawn.forEach((redraw) => redraw());
  DARK.addEventListener("change", again);
  matchMedia("(max-width: 599px)").addEventListener("change", again);
  // On paper: pictures instead of choices, charts in ink.
  addEventListener("beforeprint", () => {
    printing = true;
    document.querySelectorAll("details.picture").forEach((details) => { details.open = true; });
    again();
  });
  addEventListener("afterprint", () => {
    printing = false;
    document.querySelectorAll("details.picture").forEach((details) => { details.open = false; });
    again();
  });
}

start();
