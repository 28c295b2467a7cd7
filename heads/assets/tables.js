// Makes every table in a div.sortable sort at a click on its headings and filter as one types.
(() => {
  "use strict";
  const key = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.sort;
    return number === undefined ? cell.textContent.trim() : Number(number);
  };
  const compare = (a, b) => {
    const numbers = typeof a === "number" && typeof b === "number";
    return numbers ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  };
  const missing = (value) => value === "" || Number.isNaN(value);

  const sortBy = (table, column, descending) => {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row) => ({ row, value: key(row, column) }));
    rows.sort((a, b) => {
      const gone = missing(a.value) - missing(b.value); // what has no value stays below
      return gone || (descending ? compare(b.value, a.value) : compare(a.value, b.value));
    });
    body.append(...rows.map((item) => item.row));
    Array.from(table.tHead.rows[0].cells, (cell, at) => {
      if (at === column) cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else cell.removeAttribute("aria-sort");
    });
  };

  const makeSortable = (table) => {
    Array.from(table.tHead.rows[0].cells, (cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = cell.textContent;
      button.addEventListener("click", () => {
        const first = table.tBodies[0].rows[0];
        const numeric = first && typeof key(first, column) === "number";
        const now = cell.getAttribute("aria-sort");
        sortBy(table, column, now === null ? numeric : now === "ascending");
      });
      cell.replaceChildren(button);
    });
  };

  const makeFilterable = (box, table) => {
    const rows = Array.from(table.tBodies[0].rows);
    const named = (row) => Array.from(row.cells).filter((c) => c.dataset.sort === undefined);
    const texts = rows.map((row) => named(row).map((c) => c.textContent).join(" ").toLowerCase());
    const label = document.createElement("label");
    const input = document.createElement("input");
    const status = document.createElement("span");
    input.type = "search";
    status.setAttribute("role", "status");
    label.append("Filter rows ", input);
    const bar = document.createElement("div");
    bar.className = "filter";
    bar.append(label, status);
    box.querySelector(".scroll").before(bar);
    const apply = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      rows.forEach((row, i) => {
        const fits = words.every((word) => texts[i].includes(word));
        row.hidden = !fits;
        count += fits;
      });
      status.textContent = words.length ? `${count} of ${rows.length} rows` : "";
    };
    input.addEventListener("input", apply);
  };

  document.querySelectorAll("div.sortable:not([data-ready])").forEach((box) => {
    box.dataset.ready = "";
    const table = box.querySelector("table");
    makeSortable(table);
    if (box.dataset.filter !== undefined) makeFilterable(box, table);
  });
})();
