// Every table of a page sorts by its headings and downloads as CSV.
"use strict";

// The number in a cell, as 0.5, +0.5, 0.8 % or 2^-4.5; null for text.
function numberIn(text) {
  const found = /^(2\^)?([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)( %)?$/i.exec(text.trim());
  if (!found) return null;
  return found[1] ? 2 ** Number(found[2]) : Number(found[2]);
}

// Numbers by their size, then text.
function compare(one, other) {
  const [first, second] = [numberIn(one), numberIn(other)];
  if (first !== null && second !== null) return first - second;
  if (first !== null || second !== null) return first !== null ? -1 : 1;
  return one.localeCompare(other);
}

function sortTable(table, column, button) {
  const heading = button.closest("th");
  const ascending = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const text = (row) => row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows].sort((one, other) => compare(text(one), text(other)));
  table.tBodies[0].append(...(ascending ? rows : rows.reverse()));
}

function asCsv(table) {
  const quoted = (cell) => `"${cell.textContent.trim().replaceAll('"', '""')}"`;
  return [...table.rows].map((row) => [...row.cells].map(quoted).join(",")).join("\r\n") + "\r\n";
}

function prepareTable(table) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    button.addEventListener("click", () => sortTable(table, column, button));
    heading.replaceChildren(button);
  });
  const download = document.createElement("button");
  download.type = "button";
  download.className = "download";
  download.textContent = "Download as CSV";
  download.addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([asCsv(table)], { type: "text/csv" }));
    link.download = `${table.dataset.name}.csv`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  table.parentElement.after(download);
}

for (const table of document.querySelectorAll("table[data-name]")) prepareTable(table);
