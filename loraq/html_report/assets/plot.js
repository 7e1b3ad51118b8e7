// Rate and distortion: a point a cell, its interval as a whisker, its name where there is room; the front drawn through
// the cells of a setting that nothing of the same size or less surpasses.

const shapes = [
  (r) => drawn("circle", { r }),
  (r) => drawn("rect", { x: -r * 0.9, y: -r * 0.9, width: r * 1.8, height: r * 1.8 }),
  (r) => drawn("path", { d: `M0 ${-r * 1.2}L${r * 1.1} ${r * 0.8}H${-r * 1.1}Z` }),
  (r) => drawn("path", { d: `M0 ${-r * 1.3}L${r * 1.3} 0L0 ${r * 1.3}L${-r * 1.3} 0Z` }),
  (r) => drawn("path", { d: `M0 ${r * 1.2}L${r * 1.1} ${-r * 0.8}H${-r * 1.1}Z` }),
  (r) => drawn("path", { d: `M${-r * 1.2} 0L${-r * 0.6} ${-r}H${r * 0.6}L${r * 1.2} 0L${r * 0.6} ${r}H${-r * 0.6}Z` }),
];
function shape(model, cell) {
  const node = shapes[model.settings.indexOf(cell.setting) % shapes.length](5);
  node.classList.add("shape");
  return node;
}

const pencil = document.createElement("canvas").getContext("2d");
function textWidth(text) {
  pencil.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
  return pencil.measureText(text).width;
}
// Long names often differ at their ends alone, so the middle gives way.
const clipped = (text, length) =>
  text.length > length
    ? `${text.slice(0, Math.ceil(length * 0.55)).trimEnd()}…${text.slice(1 - length * 0.45).trimStart()}`
    : text;

function startPlot(root, model) {
  const host = root.querySelector("[data-plot]");
  if (!host) return;
  const xs = model.axes.filter((axis) => axis.axis === "x"),
    ys = model.axes.filter((axis) => axis.axis === "y");
  let size = 0;
  const figure = ys.findIndex((axis) => axis.key.startsWith("mean."));
  const starts = [...new Set([0, figure < 0 ? Math.min(1, ys.length - 1) : figure])];
  const panels = starts.map((place) => {
    const space = element("div", {}),
      panel = element("div", { class: "panel" });
    const state = { place, space };
    panel.append(
      element(
        "div",
        { class: "controls" },
        field(
          "Distortion",
          ys.map((axis) => axis.title),
          place,
          (chosen) => {
            state.place = chosen;
            update(state);
          },
        ),
      ),
      space,
    );
    host.append(panel);
    onWidth(space, () => update(state));
    return state;
  });
  function update(state) {
    panel(state.space, model, xs[size], ys[state.place]);
  }
  root.querySelector("[data-size]").append(
    choice(
      "Size",
      xs.map((axis) => axis.title),
      0,
      (chosen) => {
        size = chosen;
        panels.forEach(update);
      },
    ),
  );
  plotLegend(root.querySelector("[data-plot-legend]"), model);
}

function plotLegend(host, model) {
  const sample = (kind, node) => {
    const group = drawn("g", { class: kind, transform: "translate(8 8)" });
    group.append(node);
    return drawn("svg", { width: 16, height: 16, viewBox: "0 0 16 16", "aria-hidden": "true" }, group);
  };
  const first = shape(model, { setting: model.settings[0] });
  const entries = [
    [sample("winning", first.cloneNode()), "on the front: nothing of its size or less is better"],
    [sample("", first.cloneNode()), "surpassed"],
    [sample("", drawn("circle", { r: 7, class: "halo base" })), "baseline"],
  ];
  if (model.settings.length > 1) {
    for (const setting of model.settings)
      entries.push([sample("", shape(model, { setting })), setting || "no setting"]);
  }
  host.append(...entries.map(([picture, text]) => element("span", {}, picture, text)));
}

function front(model, cells, x, y) {
  const found = [];
  for (const setting of model.settings) {
    let best = null;
    const sorted = cells
      .filter((cell) => cell.setting === setting)
      .sort(
        (a, b) =>
          a.points[x.key][0] - b.points[x.key][0] ||
          (a.points[y.key][0] - b.points[y.key][0]) * (y.better === "higher" ? -1 : 1),
      );
    const line = sorted.filter((cell) => {
      const value = cell.points[y.key][0];
      if (best !== null && (y.better === "higher" ? value <= best : value >= best)) return false;
      best = value;
      return true;
    });
    found.push(line);
  }
  return found;
}

function panel(host, model, x, y) {
  const cells = model.cells.filter((cell) => cell.points[x.key] && cell.points[y.key]);
  if (!cells.length) {
    host.replaceChildren(element("p", { class: "says" }, "No cell has both figures."));
    return;
  }
  const width = Math.max(260, host.clientWidth),
    height = Math.round(Math.min(430, Math.max(300, width * 0.68)));
  const box = { left: 52, right: width - 10, top: 34, bottom: height - 42 };
  const values = cells.flatMap((cell) => cell.points[y.key].slice(0, 3).filter((value) => value !== null));
  if (y.key.startsWith("difference.")) values.push(0);
  const sizes = cells.map((cell) => cell.points[x.key][0]);
  const logarithmic = Math.min(...values) > 0 && Math.max(...values) / Math.min(...values) > 2.5;
  const largest = Math.max(...sizes.map(Math.abs));
  const across = scale(...padded(sizes, false, x.key === "bits" ? 0.5 : largest * 0.08), false, box.left, box.right);
  const spread = Math.max(...values.map(Math.abs)) * 0.02 || 1;
  const up = scale(...padded(values, logarithmic, spread), logarithmic, box.bottom, box.top);
  const svg = drawn("svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "group",
    "aria-label": `${y.title} against ${x.title}`,
  });
  axes(svg, box, across, up, x, y, logarithmic, height);
  const lines = front(model, cells, x, y),
    winning = new Set(lines.flat());
  const aside = dodged(
    cells,
    (cell) => across.at(cell.points[x.key][0]),
    (cell) => up.at(cell.points[y.key][0]),
    (cell) => cell.points[y.key][1] !== null,
    box,
  );
  const place = (cell) => [across.at(cell.points[x.key][0]) + aside.get(cell), up.at(cell.points[y.key][0])];
  if (y.key.startsWith("difference.")) {
    svg.append(drawn("line", { class: "zero", x1: box.left, x2: box.right, y1: up.at(0), y2: up.at(0) }));
  }
  for (const line of lines) {
    if (line.length > 1)
      svg.append(drawn("polyline", { class: "front", points: line.map((cell) => place(cell).join(",")).join(" ") }));
  }
  const points = cells.map((cell) => {
    const [left, top] = place(cell),
      [, low, high] = cell.points[y.key];
    const ends = low === null ? null : [up.at(high), up.at(low)];
    return { cell, left, top, ends, text: clipped(cell.label, 30), winning: winning.has(cell) };
  });
  const labels = placed(points, box, width);
  points.sort((a, b) => a.left - b.left || a.top - b.top);
  const nodes = points.map((point) => pointNode(model, point, labels.get(point), x, y));
  svg.append(...nodes);
  roving(svg, nodes);
  const left = points.length - labels.size,
    moved = [...aside.values()].some((shift) => shift !== 0);
  const notes = [
    moved ? "Points of almost the same size stand side by side." : "",
    left
      ? `${left} ${left === 1 ? "name has" : "names have"} no room: the pointer, or the arrow keys, tell of a point.`
      : "",
  ].filter(Boolean);
  host.replaceChildren(svg, ...(notes.length ? [element("p", { class: "legend" }, notes.join(" "))] : []));
}

// Points of almost the same size would hide each other, or their intervals: these stand side by side, from low to high.
function dodged(cells, left, top, hasInterval, box) {
  const aside = new Map(cells.map((cell) => [cell, 0]));
  const near = (a, b) =>
    Math.abs(left(a) - left(b)) <= 9 && ((hasInterval(a) && hasInterval(b)) || Math.abs(top(a) - top(b)) <= 9);
  const waiting = [...cells].sort((a, b) => left(a) - left(b));
  while (waiting.length) {
    const group = [waiting.shift()];
    for (let place = 0; place < group.length; place++) {
      for (let other = 0; other < waiting.length;) {
        if (near(group[place], waiting[other])) group.push(...waiting.splice(other, 1));
        else other++;
      }
    }
    if (group.length === 1) continue;
    const step = Math.min(13, 110 / group.length),
      half = ((group.length - 1) / 2) * step;
    const mean = group.reduce((sum, cell) => sum + left(cell), 0) / group.length;
    const middle = Math.min(Math.max(mean, box.left + half + 8), box.right - half - 8);
    group.sort((a, b) => top(b) - top(a));
    group.forEach((cell, place) => aside.set(cell, middle - left(cell) + place * step - half));
  }
  return aside;
}

function axes(svg, box, across, up, x, y, logarithmic, height) {
  for (const tick of up.ticks) {
    const at = up.at(tick.value);
    svg.append(
      drawn("line", { class: "grid", x1: box.left, x2: box.right, y1: at, y2: at }),
      drawn("text", { x: box.left - 8, y: at + 4, "text-anchor": "end" }, tick.text),
    );
  }
  let last = -Infinity;
  for (const tick of across.ticks) {
    const at = across.at(tick.value),
      text = x.key === "bits" ? tick.text : sizeText(tick.value),
      half = textWidth(text) / 2;
    if (at - half < last + 10 || at + half > box.right + 8) continue;
    last = at + half;
    svg.append(
      drawn("line", { class: "grid", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 5 }),
      drawn("text", { x: at, y: box.bottom + 19, "text-anchor": "middle" }, text),
    );
  }
  svg.append(
    drawn("line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    drawn("text", { class: "axis", x: box.right, y: height - 4, "text-anchor": "end" }, `${x.title} →`),
    drawn("text", { class: "axis", x: 0, y: 13 }, `${y.title}${logarithmic ? ", log scale" : ""}`),
    drawn(
      "text",
      { x: box.right, y: 13, "text-anchor": "end" },
      `${y.better === "higher" ? "↑ higher" : "↓ lower"} is better`,
    ),
  );
}

function pointNode(model, point, label, x, y) {
  const { cell, left, top, ends } = point;
  const lines = [
    cell.setting,
    `${x.title}: ${cell.points[x.key][3]}`,
    `${y.title}: ${cell.points[y.key][3]}`,
    point.winning ? "on the front" : "",
    cell.baseline ? "baseline" : "",
  ].filter(Boolean);
  const group = drawn("g", {
    class: `point${point.winning ? " winning" : ""}`,
    tabindex: -1,
    role: "img",
    "data-cell": cell.id,
    "aria-label": `${cell.label}; ${lines.join("; ")}`,
    onpointermove: (event) => showTip(event.clientX, event.clientY, cell.label, lines),
    onpointerleave: hideTip,
    onfocus: () => {
      const box = group.querySelector(".halo").getBoundingClientRect();
      showTip(box.right, box.bottom, cell.label, lines);
    },
    onblur: hideTip,
  });
  if (label?.far)
    group.append(drawn("line", { class: "leader", x1: left, y1: top, x2: label.hook[0], y2: label.hook[1] }));
  group.append(drawn("circle", { class: cell.baseline ? "halo base" : "halo", cx: left, cy: top, r: 10 }));
  if (ends)
    group.append(
      drawn("path", {
        class: "whisker",
        d: `M${left} ${ends[0]}V${ends[1]}M${left - 3} ${ends[0]}h6M${left - 3} ${ends[1]}h6`,
      }),
    );
  const mark = shape(model, cell);
  mark.setAttribute("transform", `translate(${left} ${top})`);
  group.append(mark);
  if (label) group.append(drawn("text", { class: "name", x: label.box[0], y: label.box[3] - 3.5 }, point.text));
  return group;
}

// One stop of the Tab key for all points; the arrow keys go from one to the next.
function roving(svg, nodes) {
  nodes[0].setAttribute("tabindex", 0);
  svg.addEventListener("keydown", (event) => {
    const place = nodes.indexOf(event.target),
      step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (place < 0 || !step) return;
    event.preventDefault();
    const next = nodes[(place + step + nodes.length) % nodes.length];
    nodes[place].setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
}

// Names beside their points: of some hundred places each, the nearest that meets no point, whisker or other name.
function placed(points, box, width) {
  const taken = points.flatMap(({ left, top, ends }) => [
    [left - 8, top - 8, left + 8, top + 8],
    ...(ends ? [[left - 3, ends[0] - 1, left + 3, ends[1] + 1]] : []),
  ]);
  const hooks = [],
    found = new Map();
  const order = [...points].sort((a, b) => b.winning - a.winning || b.cell.baseline - a.cell.baseline || a.top - b.top);
  for (const point of order) {
    const length = textWidth(point.text),
      high = 15;
    let best = null;
    for (const distance of points.length > 16 ? [0, 8, 16, 26] : [0, 10, 20, 32, 46, 62, 80]) {
      for (const turn of [0, 180, -20, 20, 200, 160, -45, 45, 225, 135, -90, 90]) {
        const dx = Math.cos((turn * Math.PI) / 180),
          dy = Math.sin((turn * Math.PI) / 180),
          reach = 11 + distance;
        const middle = point.top + dy * reach;
        const start =
          Math.abs(dx) < 0.1
            ? point.left - length / 2
            : dx > 0
              ? point.left + dx * reach
              : point.left + dx * reach - length;
        const area = [start, middle - high / 2, start + length, middle + high / 2];
        if (area[0] < box.left || area[2] > width - 2 || area[1] < 16 || area[3] > box.bottom - 1) continue;
        const hook = [
          Math.min(Math.max(point.left, area[0]), area[2]),
          Math.min(Math.max(point.top, area[1]), area[3]),
        ];
        const far = distance > 0;
        const free =
          !taken.some((other) => meets(area, other)) &&
          !hooks.some((line) => crosses(line, area)) &&
          !(far && [...found.values()].some((other) => crosses([point.left, point.top, ...hook], other.box)));
        if (free) {
          best = { box: area, hook, far };
          break;
        }
      }
      if (best) break;
    }
    if (!best) continue;
    found.set(point, best);
    taken.push(best.box);
    if (best.far) hooks.push([point.left, point.top, ...best.hook]);
  }
  return found;
}
const meets = (a, b) => a[0] < b[2] + 2 && b[0] < a[2] + 2 && a[1] < b[3] && b[1] < a[3];
function crosses(line, area) {
  for (let step = 1; step < 12; step++) {
    const x = line[0] + ((line[2] - line[0]) * step) / 12,
      y = line[1] + ((line[3] - line[1]) * step) / 12;
    if (x > area[0] && x < area[2] && y > area[1] && y < area[3]) return true;
  }
  return false;
}
