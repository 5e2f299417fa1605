// Tables: headings that sort, filters, and the choice of columns. Without JavaScript the tables
// are whole and in the order of the ranking.
"use strict";

const collator = new Intl.Collator("en", { numeric: true });

// The number a cell is sorted by, or null: its data-sort, or what its text begins with.
function numberOf(cell) {
  const text = cell.dataset.sort ?? cell.firstChild?.textContent ?? "";
  const number = parseFloat(text.trim().replace("−", "-").replaceAll(",", ""));
  return Number.isNaN(number) ? null : number;
}

// In a column of numbers, words ("failed", "–") come last in either direction.
function compare(a, b, sign) {
  if (a.number !== null && b.number !== null) return sign * (a.number - b.number);
  if (a.number !== null || b.number !== null) return a.number === null ? 1 : -1;
  return sign * collator.compare(a.text, b.text);
}

function sortBy(table, heading) {
  const words = heading.classList.contains("words");
  const { first } = heading.dataset;
  const other = first === "ascending" ? "descending" : "ascending";
  const order = heading.getAttribute("aria-sort") === first ? other : first;
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const keys = [...table.tBodies[0].rows].map((row) => {
    const cell = row.cells[heading.cellIndex];
    return { row, text: cell.textContent, number: words ? null : numberOf(cell) };
  });
  keys.sort((a, b) => compare(a, b, order === "ascending" ? 1 : -1));
  table.tBodies[0].append(...keys.map((key) => key.row));
}

function makeSortable(table) {
  for (const heading of table.tHead.rows[0].cells) {
    const ascending = heading.classList.contains("words") || heading.hasAttribute("aria-sort");
    heading.dataset.first = ascending ? "ascending" : "descending";
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sortBy(table, heading));
    heading.append(button);
  }
}

// A row stays if it has every word, and the chosen value of each facet that it knows at all.
function filterRows(form) {
  const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
  const chosen = [...form.querySelectorAll("select")].filter((select) => select.selectedIndex > 0);
  for (const table of document.querySelectorAll("main table")) {
    const rows = [...table.tBodies[0].rows];
    for (const row of rows) {
      const fits = chosen.every(({ name, value }) => (row.dataset[name] ?? value) === value);
      const text = words.length ? row.textContent.toLowerCase() : "";
      row.hidden = !fits || !words.every((word) => text.includes(word));
    }
    table.closest(".board").hidden = rows.every((row) => row.hidden);
  }
  countRows(form);
}

function countRows(form) {
  const rows = [...document.querySelectorAll("section.shown tbody tr")];
  const shown = rows.filter((row) => !row.hidden).length;
  form.querySelector("output").value = shown < rows.length ? `${shown} of ${rows.length} rows` : "";
}

const columnName = (heading) => heading.querySelector("button").firstChild.textContent.trim();

// One choice for all tables of the page: what is hidden in one is hidden in its neighbors.
const hiddenColumns = new Set();

function hideColumns() {
  for (const table of document.querySelectorAll("main table")) {
    for (const heading of table.tHead.rows[0].cells) {
      const hidden = hiddenColumns.has(columnName(heading));
      if (heading.hidden === hidden) continue;
      for (const row of table.rows) row.cells[heading.cellIndex].hidden = hidden;
    }
  }
}

// A checkbox for every column of the tables of a section, but for those that name the rows.
function offerColumns(form, section) {
  const headings = [...section.querySelectorAll("thead th")].filter((heading) =>
    heading.closest("table").tBodies[0].rows[0]?.cells[heading.cellIndex].scope !== "row");
  const boxes = [...new Set(headings.map(columnName))].map((name) => {
    const box = document.createElement("input");
    box.type = "checkbox";
    box.defaultChecked = true;
    box.checked = !hiddenColumns.has(name);
    box.addEventListener("change", () => {
      hiddenColumns[box.checked ? "delete" : "add"](name);
      hideColumns();
    });
    const label = document.createElement("label");
    label.append(box, ` ${name}`);
    return label;
  });
  const fieldset = form.querySelector("fieldset");
  fieldset.replaceChildren(fieldset.firstElementChild, ...boxes);
}

function setUpTables(form) {
  document.querySelectorAll("main table").forEach(makeSortable);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => filterRows(form));
  form.querySelector("button").addEventListener("click", () => {
    form.reset();
    hiddenColumns.clear();
    hideColumns();
    filterRows(form);
  });
}
