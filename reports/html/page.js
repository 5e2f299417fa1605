// The page: dark mode, sections as tabs, and the panel that shows the records behind a number.
// Without JavaScript the sections follow one another, and links lead to the rows of the records.

const root = document.documentElement;
root.classList.add("js");

// Storage is refused in some browsers' private or local pages; then nothing is remembered.
function remember(theme) {
  try {
    if (theme) localStorage.setItem("robench-theme", theme);
    else localStorage.removeItem("robench-theme");
  } catch { /* see above */ }
}

function remembered() {
  try {
    return localStorage.getItem("robench-theme");
  } catch {
    return null;
  }
}

if (remembered()) root.dataset.theme = remembered();

function setUpTheme(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const systems = () => (system.matches ? "dark" : "light");
  const tell = () => {
    const dark = (root.dataset.theme ?? systems()) === "dark";
    button.setAttribute("aria-pressed", dark);
  };
  button.addEventListener("click", () => {
    const theme = button.getAttribute("aria-pressed") === "true" ? "light" : "dark";
    // Who chooses what the system has goes with the system again.
    if (theme === systems()) delete root.dataset.theme;
    else root.dataset.theme = theme;
    remember(root.dataset.theme);
    tell();
  });
  system.addEventListener("change", tell);
  button.hidden = false;
  tell();
}

function show(section, form) {
  for (const other of document.querySelectorAll("main > section")) {
    other.classList.toggle("shown", other === section);
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${section.id}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  form.hidden = !section.querySelector("table");
  offerColumns(form, section);
  countRows(form);
}

// One table for some rows of a table: a line for each column, what is the same said once.
function factSheet(table, rows) {
  const sheet = document.createElement("table");
  sheet.createCaption().textContent = table.querySelector("h3").textContent;
  for (const heading of table.tHead.rows[0].cells) {
    const cells = rows.map((row) => row.cells[heading.cellIndex]);
    const texts = cells.map((cell) => cell.textContent);
    if (texts.every((text) => text === "–")) continue;
    const line = sheet.insertRow();
    const th = document.createElement("th");
    th.scope = "row";
    th.textContent = heading.textContent;
    line.append(th);
    const same = texts.every((text) => text === texts[0]);
    for (const cell of same ? cells.slice(0, 1) : cells) {
      const td = line.insertCell();
      const link = cell.querySelector("a");
      // Where a link only leads to another fact sheet of this panel, its text is enough.
      const keep = link && (link.hash === `#${cell.parentNode.id}` || !link.hash);
      td.append(keep ? link.cloneNode(true) : cell.textContent);
      if (same) td.colSpan = rows.length;
    }
  }
  return sheet;
}

// The rows and all rows that they link to: the record, its attack, its network, its training.
function openPanel(panel, rows) {
  const found = new Map();
  const visit = (row) => {
    const table = row.closest("table");
    if (found.get(table)?.includes(row)) return;
    found.set(table, [...(found.get(table) ?? []), row]);
    for (const link of row.querySelectorAll('a[href^="#"]')) visit(byHash(link.hash));
  };
  rows.forEach(visit);
  const sheets = [...found].map(([table, some]) => factSheet(table, some));
  const body = panel.querySelector(".sheets");
  body.replaceChildren(...sheets);
  if (!panel.open) panel.showModal();
  body.scrollTop = 0;
}

const byHash = (hash) => document.getElementById(hash.slice(1));

function setUpPanel(panel) {
  panel.querySelector("button").addEventListener("click", () => panel.close());
  panel.addEventListener("click", (event) => {
    if (event.target === panel) panel.close(); // beside it
  });
  document.querySelector("main").addEventListener("click", (event) => {
    const link = event.target.closest('td a[href^="#"], th a[href^="#"]');
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    openPanel(panel, (link.dataset.rows ?? link.hash).split(" ").map(byHash));
  });
}

document.addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("tools");
  const panel = document.getElementById("panel");
  setUpTables(form);
  setUpTheme(document.getElementById("theme"));
  setUpPanel(panel);
  const route = () => {
    const target = byHash(location.hash);
    if (target?.matches("tr")) return openPanel(panel, [target]);
    const section = target?.closest("main > section");
    if (section && !section.classList.contains("shown")) {
      panel.close();
      show(section, form);
      scrollTo(0, 0);
    }
  };
  show(document.querySelector("main > section"), form);
  addEventListener("hashchange", route);
  route();
});
