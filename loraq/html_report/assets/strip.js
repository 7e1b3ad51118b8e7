// The heat strip: a lane a cell, a place a layer, one scale of colours for all lanes; pointer or arrow keys tell.

const lane = 22,
  bar = 20;

function blocks(names) {
  // Runs of layers of one block: the name up to its first number, "transformer_blocks" and "3".
  const runs = [];
  names.forEach((name, place) => {
    const found = /^(.*?)\.(\d+)(?=\.|$)/.exec(name);
    const stem = found ? found[1] : name.split(".")[0],
      number = found ? found[2] : "";
    const last = runs[runs.length - 1];
    if (last && last.stem === stem && last.number === number) last.end = place + 1;
    else runs.push({ stem, number, start: place, end: place + 1 });
  });
  return runs;
}

function startStrip(root, model) {
  const host = root.querySelector("[data-strip]"),
    found = model.strip;
  if (!host || !found) return;
  const identifier = new Map(model.cells.map((cell) => [cell.label, cell.id]));
  const state = {
    quantity: found.quantities[0],
    at: null,
    cell: Math.max(0, found.labels.indexOf(model.first[1])),
    runs: blocks(found.layers),
  };
  const canvas = element("canvas", { "aria-hidden": "true" });
  const marker = element("div", { class: "marker", hidden: true });
  const ramp = element("canvas", { width: 140, height: 10, "aria-hidden": "true" });
  const ends = [element("span", {}), element("span", {})];
  const readout = element("output", { class: "readout", "aria-live": "polite" });
  const names = element(
    "ol",
    { "aria-hidden": "true" },
    ...found.labels.map((label) =>
      element("li", { title: label, "data-cell": identifier.get(label) }, clipped(label, 30)),
    ),
  );
  const lanes = element(
    "div",
    {
      class: "lanes",
      tabindex: 0,
      role: "application",
      "aria-roledescription": "heat map",
      "aria-label": `${model.name}: ${found.layers.length} layers of ${found.labels.length} cells; arrow keys move, Home and End go to the ends`,
    },
    canvas,
    marker,
  );
  const worst = element("div", {
    class: "scroller worst",
    tabindex: 0,
    role: "region",
    "aria-label": `Layers with the largest figures, ${model.name}`,
  });
  const cells = field("Largest figures of", found.labels, state.cell, (place) => {
    state.cell = place;
    listWorst();
  });
  const titles = found.quantities.map((quantity) => quantity.title);
  host.append(
    element(
      "div",
      { class: "controls" },
      choice("Show", titles, 0, (place) => {
        state.quantity = found.quantities[place];
        draw();
        listWorst();
      }),
      element("span", { class: "ramp" }, ends[0], ramp, ends[1]),
    ),
    element("div", { class: "map" }, names, lanes),
    readout,
    element("div", { class: "controls" }, cells),
    worst,
  );

  const values = () => found.values[state.quantity.key];
  function range() {
    const all = values()
      .flat()
      .filter((value) => value !== null && (!state.quantity.logarithmic || value > 0));
    return all.length ? [Math.min(...all), Math.max(...all)] : [0, 0];
  }
  function share(value, [low, high]) {
    if (high === low) return 0.5;
    if (!state.quantity.logarithmic) return (value - low) / (high - low);
    return value <= 0 ? 0 : Math.log(value / low) / Math.log(high / low);
  }

  function draw() {
    const count = found.layers.length;
    const step = Math.max(4, lanes.clientWidth / count),
      width = Math.max(1, step * count),
      height = lane * found.labels.length + 36;
    const sharp = Math.min(devicePixelRatio || 1, Math.max(1, 16000 / width));
    canvas.width = Math.round(width * sharp);
    canvas.height = Math.round(height * sharp);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d"),
      limits = range();
    pen.scale(sharp, sharp);
    state.step = step;
    const starts = new Set(state.runs.map((run) => run.start));
    values().forEach((row, line) =>
      row.forEach((value, place) => {
        const left = place * step + (starts.has(place) && place && step > 3 ? 1 : 0),
          right = (place + 1) * step;
        pen.fillStyle = value === null ? resolved("--line") : colour(share(value, limits));
        if (value === null)
          pen.fillRect(left, line * lane + bar / 2 - 1, right - left, 2); // a thin line: none here
        else pen.fillRect(left, line * lane, right - left + (step > 3 ? 0.4 : 0), bar);
      }),
    );
    underline(pen, step, lane * found.labels.length);
    mark();
    const scaleOf = ramp.getContext("2d");
    for (let place = 0; place < 140; place++) {
      scaleOf.fillStyle = colour(place / 139);
      scaleOf.fillRect(place, 0, 1, 10);
    }
    ends.forEach((end, place) => {
      end.textContent = short(limits[place]);
    });
    if (state.quantity.logarithmic) ends[1].textContent += ", log";
  }
  const resolved = (name) => {
    lanes.style.color = `var(${name})`;
    const found = getComputedStyle(lanes).color;
    lanes.style.color = "";
    return found;
  };
  function underline(pen, step, top) {
    pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    pen.textBaseline = "top";
    pen.fillStyle = resolved("--soft");
    let last = -Infinity;
    for (const run of state.runs) {
      const middle = ((run.start + run.end) / 2) * step,
        half = pen.measureText(run.number).width / 2;
      if (run.number && middle - half > last + 3) {
        pen.fillText(run.number, middle - half, top + 3);
        last = middle + half;
      }
    }
    let place = 0,
      free = 0;
    while (place < state.runs.length) {
      let end = place;
      while (end + 1 < state.runs.length && state.runs[end + 1].stem === state.runs[place].stem) end++;
      const left = state.runs[place].start * step,
        right = state.runs[end].end * step;
      const text = state.runs[place].stem,
        width = pen.measureText(text).width;
      if (left >= free && width < right - left + 2) {
        pen.fillText(text, left, top + 18);
        free = left + width + 8;
      }
      place = end + 1;
    }
  }
  function mark() {
    marker.hidden = !state.at;
    if (!state.at) return;
    const sizes = { left: state.at[1] * state.step, top: state.at[0] * lane, width: state.step, height: bar };
    for (const [name, value] of Object.entries(sizes)) marker.style[name] = `${value}px`;
  }

  function told(line, place) {
    const lines = found.quantities.flatMap((quantity) => {
      const value = found.values[quantity.key][line][place];
      return value === null ? [] : [`${quantity.title} ${short(value)}`];
    });
    const name = found.layers[place],
      reason = found.reasons[line][name],
      rank = found.ranks[line][place];
    const shape = `${found.shapes[place]}${rank ? `, rank ${rank}` : ""}`;
    return [
      found.labels[line],
      shape,
      ...(lines.length ? lines : [reason ? `stays in 16 bits: ${reason}` : "not quantized in this cell"]),
    ];
  }
  function select(line, place, at) {
    state.at = [line, place];
    mark();
    const lines = told(line, place);
    readout.textContent = `${found.layers[place]}: ${lines.join(" · ")}`;
    showTip(...at, found.layers[place], lines);
    light(identifier.get(found.labels[line]));
  }
  function clear() {
    if (!state.at) return;
    state.at = null;
    readout.textContent = "";
    hideTip();
    light(null);
    mark();
  }
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    const line = Math.floor((event.clientY - box.top) / lane),
      place = Math.floor((event.clientX - box.left) / state.step);
    if (line < 0 || line >= found.labels.length || place < 0 || place >= found.layers.length) clear();
    else select(line, place, [event.clientX, event.clientY]);
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point); // a touch does not move
  canvas.addEventListener("pointerleave", clear);
  lanes.addEventListener("blur", clear);
  lanes.addEventListener("keydown", (event) => {
    const [line, place] = state.at || [0, 0],
      last = found.layers.length - 1;
    const moves = {
      ArrowRight: [line, place + (state.at ? 1 : 0)],
      ArrowLeft: [line, place - 1],
      ArrowDown: [line + (state.at ? 1 : 0), place],
      ArrowUp: [line - 1, place],
      Home: [line, 0],
      End: [line, last],
    };
    if (event.key === "Escape") clear();
    if (!moves[event.key]) return;
    event.preventDefault();
    const next = [
      Math.min(Math.max(moves[event.key][0], 0), found.labels.length - 1),
      Math.min(Math.max(moves[event.key][1], 0), last),
    ];
    const left = next[1] * state.step;
    if (left < lanes.scrollLeft || left + state.step > lanes.scrollLeft + lanes.clientWidth)
      lanes.scrollLeft = left - lanes.clientWidth / 2;
    const box = canvas.getBoundingClientRect();
    select(...next, [box.left + left + state.step, box.top + (next[0] + 1) * lane]);
  });

  function listWorst() {
    const all = values()[state.cell];
    const rows = all.map((value, place) => ({ value, place })).filter((each) => each.value !== null);
    rows.sort((a, b) => b.value - a.value || a.place - b.place);
    const shown = found.quantities.filter((quantity) =>
      found.values[quantity.key][state.cell].some((value) => value !== null),
    );
    const head = element(
      "tr",
      {},
      element("th", { scope: "col" }, "layer"),
      element("th", { scope: "col" }, "out × inn"),
      element("th", { scope: "col" }, "rank"),
      ...shown.map((quantity) =>
        element("th", { scope: "col", class: quantity === state.quantity ? "chosen" : null }, quantity.title),
      ),
    );
    const body = rows
      .slice(0, 8)
      .map(({ place }) =>
        element(
          "tr",
          {},
          element("th", { scope: "row" }, found.layers[place]),
          element("td", {}, found.shapes[place]),
          element("td", {}, found.ranks[state.cell][place] || "–"),
          ...shown.map((quantity) =>
            element(
              "td",
              { class: quantity === state.quantity ? "chosen" : null },
              short(found.values[quantity.key][state.cell][place]),
            ),
          ),
        ),
      );
    worst.replaceChildren(
      rows.length
        ? element("table", {}, element("thead", {}, head), element("tbody", {}, ...body))
        : element("p", { class: "says" }, "This cell has no such figure."),
    );
  }
  onWidth(lanes, draw);
  listeners.push(draw);
  draw();
  listWorst();
}
