// Headings become buttons that sort. Without JavaScript the tables keep the order of the ranking.
"use strict";

// The number a cell is sorted by, or null: its data-sort, or what its text begins with.
function numberOf(cell) {
  const text = cell.dataset.sort ?? cell.firstChild?.textContent ?? "";
  const number = parseFloat(text.trim().replace("−", "-").replaceAll(",", ""));
  return Number.isNaN(number) ? null : number;
}

// In a column of numbers, words ("failed", "–") come last in either direction.
function compare(a, b, sign, words) {
  const [x, y] = words ? [null, null] : [numberOf(a), numberOf(b)];
  if (x !== null && y !== null) return sign * (x - y);
  if (x !== null || y !== null) return x === null ? 1 : -1;
  return sign * a.textContent.localeCompare(b.textContent);
}

function sortBy(table, heading) {
  const words = heading.classList.contains("words");
  const first = words ? "ascending" : "descending";
  const other = first === "ascending" ? "descending" : "ascending";
  const order = heading.getAttribute("aria-sort") === first ? other : first;
  const sign = order === "ascending" ? 1 : -1;
  for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const rows = [...table.tBodies[0].rows];
  const column = heading.cellIndex;
  rows.sort((a, b) => compare(a.cells[column], b.cells[column], sign, words));
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table")) {
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    button.addEventListener("click", () => sortBy(table, heading));
    heading.replaceChildren(button);
  }
}
