// Sorting: a click or a key press on a column's button; the first time best first, then the other way round.

function sortable(table, announce) {
  const body = table.tBodies[table.tBodies.length - 1];
  const heads = [...table.querySelectorAll("thead th:not(.group)")];
  // The first row's heads that span both come before and after the others: a head's place is where it lies.
  const first = [...table.tHead.rows[0].cells],
    second = [...table.tHead.rows[1].cells];
  const inOrder = first.flatMap((head) =>
    head.classList.contains("group") ? second.splice(0, Number(head.getAttribute("colspan"))) : [head],
  );
  inOrder.forEach((head, place) => {
    head.querySelector("button").addEventListener("click", () => sort(head, place));
  });

  function sort(head, place) {
    const button = head.querySelector("button"),
      before = head.getAttribute("aria-sort");
    const opposite = { ascending: "descending", descending: "ascending" };
    const direction = opposite[before] || button.dataset.first;
    for (const each of heads) each.setAttribute("aria-sort", each === head ? direction : "none");
    const rows = [...body.rows].map((row, index) => ({ row, index, value: figureOf(row, place) }));
    rows.sort((a, b) => ordered(a.value, b.value, direction) || a.index - b.index);
    body.append(...rows.map((each) => each.row));
    announce(`Sorted by ${button.textContent.trim()}, ${direction}.`);
  }
}

function figureOf(row, place) {
  const found = row.cells[place]?.dataset.value; // failed cells have fewer places
  if (found === undefined || found === "") return null;
  return Number.isNaN(Number(found)) ? found : Number(found);
}

function ordered(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null); // what has no figure is last either way
  const difference =
    typeof a === "number" && typeof b === "number"
      ? a - b
      : String(a).localeCompare(String(b), "en", { numeric: true });
  return direction === "ascending" ? difference : -difference;
}
