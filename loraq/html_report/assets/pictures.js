// Pictures: the 16-bit model's, A and B side by side; pointer, focus or a press swap a picture for its difference.

function startPictures(root, model) {
  const host = root.querySelector("[data-pictures]"),
    found = model.pictures;
  if (!host || !found) return;
  const cells = new Map(model.cells.map((cell) => [cell.label, cell]));
  const several = found.labels.length > 1;
  const first = model.first.map((label) => Math.max(0, found.labels.indexOf(label)));
  if (several && first[0] === first[1]) first[1] = first[0] ? 0 : 1;
  const state = { chosen: several ? first : [0], swap: 0, all: false };
  const cards = element("div", { class: `cards${found.pixelated ? " pixelated" : ""}` });
  const said = element("p", { class: "unseen", "aria-live": "polite" });
  const names = found.labels.map((label) => (cells.get(label)?.baseline ? `${label} (baseline)` : label));
  const letters = several ? ["A", "B"] : [""];
  const toggle = element(
    "button",
    { type: "button", class: "quiet", "aria-pressed": "false", onclick: swapAll },
    "Swap all ",
    element("kbd", {}, "D"),
  );
  host.append(
    element(
      "div",
      { class: "controls" },
      ...(several
        ? letters.map((letter, side) =>
            field(letter, names, state.chosen[side], (place) => {
              state.chosen[side] = place;
              draw();
            }),
          )
        : []),
      ...(found.labels.length
        ? [
            choice("Hover or focus shows", [`difference × ${data.factor}`, "16-bit"], 0, (place) => {
              state.swap = place;
              draw();
            }),
            toggle,
          ]
        : []),
      choice("Size", ["small", "large"], 0, (place) => cards.classList.toggle("large", place === 1)),
    ),
    said,
    cards,
  );

  function swapAll() {
    state.all = !state.all;
    toggle.setAttribute("aria-pressed", String(state.all));
    said.textContent = state.all
      ? `All pictures of ${letters.join(" and ")} are swapped.`
      : "All pictures are as they were drawn.";
    for (const shot of cards.querySelectorAll("button.shot")) shot.swap();
  }
  document.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() !== "d" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input:not([type=radio]), select, textarea")) return;
    swapAll();
  });

  function shotNode(scene, place, letter, cell) {
    const made = found.shots[cell][place],
      label = found.labels[cell],
      name = letter ? `${letter}: ${label}` : label;
    const caption = element(
      "div",
      { class: "what" },
      element("b", {}, letter || label),
      letter ? ` ${label}` : "",
      made && made[2] !== null
        ? element("span", {}, element("br"), made[2] >= 99 ? "equal to 16-bit" : `${made[2].toFixed(1)} dB PSNR`)
        : null,
    );
    if (!made) return element("div", {}, element("div", { class: "missing" }, "no picture"), caption);
    const image = element("img", { src: made[0], alt: `${name}: ${scene.prompt}` });
    const over = element("span", { class: "over", hidden: true });
    const button = element("button", { type: "button", class: "shot", "aria-pressed": "false" }, image, over);
    let near = false,
      pinned = false;
    button.swap = () => {
      const other = state.swap ? found.originals[place] : made[1];
      const swapped = other && (near || pinned) !== state.all;
      image.src = swapped ? other : made[0];
      const what = state.swap ? "16-bit" : `difference × ${data.factor}`;
      image.alt = swapped ? `${what}, ${name}: ${scene.prompt}` : `${name}: ${scene.prompt}`;
      over.textContent = swapped ? what : "";
      over.hidden = !swapped;
    };
    for (const [event, value] of [
      ["pointerenter", true],
      ["focus", true],
      ["pointerleave", false],
      ["blur", false],
    ]) {
      button.addEventListener(event, () => {
        near = value;
        button.swap();
      });
    }
    button.addEventListener("click", () => {
      pinned = !pinned;
      button.setAttribute("aria-pressed", String(pinned));
      if (!pinned) near = false;
      button.swap();
    });
    button.swap();
    return element("div", {}, button, caption);
  }

  function draw() {
    cards.replaceChildren(
      ...found.scenes.map((scene, place) => {
        const original = found.originals[place];
        const first = element(
          "div",
          {},
          original
            ? element("div", { class: "shot" }, element("img", { src: original, alt: `16-bit: ${scene.prompt}` }))
            : element("div", { class: "missing" }, "no picture"),
          element("div", { class: "what" }, element("b", {}, "16-bit")),
        );
        const others = found.labels.length
          ? state.chosen.map((cell, side) => shotNode(scene, place, letters[side], cell))
          : [];
        return element(
          "figure",
          { class: "card" },
          element("div", { class: "trio" }, first, ...others),
          element("figcaption", {}, scene.prompt, " ", element("span", { class: "seed" }, `seed ${scene.seed}`)),
        );
      }),
    );
  }
  draw();
}
