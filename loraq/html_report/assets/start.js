// Everything begins here.

startTheme();
joinCells(document.body);
copyButtons();
for (const root of document.querySelectorAll("[data-model]")) {
  const model = data.models[Number(root.dataset.model)],
    said = root.querySelector("[data-sorted]");
  sortable(root.querySelector("table.sortable"), (text) => {
    said.textContent = text;
  });
  startPlot(root, model);
  startStrip(root, model);
  startPictures(root, model);
}
