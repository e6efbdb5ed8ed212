"use strict";
// Tables are sorted by the buttons in their heads: numbers by data-value, text as it stands; what is no number is last.
function compare(one, other) {
  const [a, b] = [one, other].map((cell) => cell.dataset.value ?? cell.textContent.trim());
  const [x, y] = [Number.parseFloat(a), Number.parseFloat(b)];
  if (one.dataset.value === undefined) return a.localeCompare(b, undefined, { numeric: true });
  return x - y;
}
function sort(table, column, ascending) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const lacks = (row) => row.cells[column].dataset.value === "nan";
  const known = rows.filter((row) => !lacks(row));
  known.sort((a, b) => (ascending ? 1 : -1) * compare(a.cells[column], b.cells[column]));
  body.append(...known, ...rows.filter(lacks));
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const ascending = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    sort(head.closest("table"), head.cellIndex, ascending);
  });
}
for (const field of document.querySelectorAll("input.filter")) {
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const row of document.getElementById(field.dataset.table).tBodies[0].rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
    }
  });
}
// One sound at a time.
document.addEventListener("play", (event) => {
  for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
}, true);
