// Tables that can be sorted and filtered: <div class="sheet" data-sheet="name"> becomes one.

const FIRST = 15; // rows shown before all are asked for
const TEXTUAL = ["label", "param", "text", "id"];
// What a reader chooses by: kinds, and columns of text.
const choosable = ({ kind, key }) => ["label", "param"].includes(kind) || ["outcome", "verdict", "experiment", "timing", "bound", "mode"].includes(key);

function sheet(box) {
  const table = DATA.tables[box.dataset.sheet];
  const { columns, rows, name } = table;
  const lines = rows.map((values) => ({
    values,
    text: values.map((value, i) => words(value, columns[i].kind)).join(" ").toLowerCase(),
    row: null,
  }));
  const state = { by: -1, down: false, all: false, everything: false, search: [], chosen: new Map() };

  const controls = el("form", { class: "controls", role: "search", "aria-label": `Filter: ${table.words}`, onsubmit: () => false });
  const search = el("input", { type: "search", id: `${name}-search`, autocomplete: "off", placeholder: "words, all of them" });
  search.oninput = () => { state.search = search.value.toLowerCase().split(/\s+/).filter(Boolean); show(); };
  controls.append(el("label", {}, "find", search));
  columns.forEach((column, i) => {
    const values = [...new Set(rows.map((row) => row[i]))].filter((value) => value !== null && value !== false);
    if (!choosable(column) || values.length < 2 || values.length > 30) return;
    const select = el("select", { id: `${name}-choose-${i}` }, el("option", { value: "" }, "all"));
    values.sort(compare).forEach((value) => select.append(el("option", { value: String(value) }, String(value))));
    select.onchange = () => {
      if (select.value) state.chosen.set(i, select.value); else state.chosen.delete(i);
      show();
    };
    controls.append(el("label", {}, column.title, select));
  });
  if (columns.some((column) => !column.main)) {
    const tick = el("input", { type: "checkbox", id: `${name}-columns` });
    tick.onchange = () => { state.everything = tick.checked; header(); lines.forEach((line) => { line.row = null; }); show(); };
    controls.append(el("label", { class: "tick" }, tick, "all columns"));
  }

  const status = el("p", { class: "status", role: "status" });
  const head = el("tr");
  const body = el("tbody");
  const more = el("button", { type: "button", class: "more" });
  more.onclick = () => { state.all = !state.all; show(); };
  const grid = el("table", {}, el("caption", { class: "unseen" }, table.words), el("thead", {}, head), body);
  const scroll = el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": `Table: ${table.words}` }, grid);
  box.replaceChildren(...(rows.length > 5 ? [controls] : []), status, scroll, more);

  function visible() {
    return columns.map((column, i) => [column, i]).filter(([column]) => state.everything || column.main);
  }

  function header() {
    head.replaceChildren(...visible().map(([column, i]) => {
      const button = el("button", { type: "button" }, column.title);
      const cell = el("th", { scope: "col", "aria-sort": "none", ...(column.help && { title: column.help }) }, button);
      if (!TEXTUAL.includes(column.kind)) cell.className = "number";
      cell.dataset.column = i;
      button.onclick = () => { state.down = state.by === i && !state.down; state.by = i; show(); };
      return cell;
    }));
  }

  function row(line) {
    line.row ??= el("tr", {}, ...visible().map(([column, i]) => {
      const value = line.values[i];
      const cell = el("td", {}, column.kind === "label" ? badge(value) : words(value, column.kind));
      if (!TEXTUAL.includes(column.kind)) cell.className = "number";
      else if (column.kind === "id") cell.className = "id";
      else if (String(value ?? "").length > 24) cell.className = "wide";
      else cell.className = "tight";
      if (column.key === "outcome") cell.classList.add("outcome", `outcome-${value}`);
      if (value === false) cell.setAttribute("aria-label", "could not be told");
      return cell;
    }));
    return line.row;
  }

  function show() {
    const kept = lines.filter((line) => state.search.every((word) => line.text.includes(word))
      && [...state.chosen].every(([i, wanted]) => String(line.values[i]) === wanted));
    if (state.by >= 0) {
      // Empty fields stay at the end in both directions; equal ones keep their order.
      kept.sort((a, b) => {
        const [x, y] = [a, b].map((line) => sortKey(line.values[state.by]));
        if (x === null || y === null) return (x === null) - (y === null);
        return state.down ? compare(y, x) : compare(x, y);
      });
    }
    const shown = state.all ? kept : kept.slice(0, FIRST);
    body.replaceChildren(...shown.map(row));
    for (const cell of head.children) {
      const sorted = Number(cell.dataset.column) === state.by;
      cell.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
    }
    const counts = kept.length === lines.length ? `${lines.length}` : `${kept.length} of ${lines.length}`;
    status.textContent = `${counts} ${lines.length === 1 ? "row" : "rows"}${shown.length < kept.length ? `, the first ${shown.length} shown` : ""}`;
    more.hidden = kept.length <= FIRST;
    more.textContent = state.all ? "Show fewer" : `Show all ${kept.length}`;
  }

  header();
  show();
}

function badge(label) {
  const pen = PENS.get(label);
  if (!pen) return String(label ?? "");
  const mark = el("span", { class: `mark mark-${pen.index}`, "aria-hidden": "true" }, pen.character);
  return el("span", { class: "badge" }, mark, ` ${label}`);
}
