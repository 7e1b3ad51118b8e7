"use strict";
// What all parts share: the data, making elements, the hover text, joining a cell's places, the theme.

const data = JSON.parse(document.getElementById("data").textContent);
const drawingSpace = document.querySelector("#theme svg").namespaceURI;

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null)); // text is set as text, never parsed
  return node;
}
const element = (tag, attributes, ...children) => filled(document.createElement(tag), attributes, children);
const drawn = (tag, attributes, ...children) =>
  filled(document.createElementNS(drawingSpace, tag), attributes, children);

let identifiers = 0;
const fresh = (word) => `${word}-${++identifiers}`;

function field(title, options, chosen, change) {
  const select = element(
    "select",
    { onchange: () => change(Number(select.value)) },
    ...options.map((text, place) => element("option", { value: place, selected: place === chosen }, text)),
  );
  return element("label", { class: "field" }, title, select);
}

function choice(title, options, chosen, change) {
  const name = fresh("choice");
  return element(
    "fieldset",
    { class: "choice" },
    element("legend", {}, title),
    element(
      "span",
      { class: "options" },
      ...options.map((text, place) =>
        element(
          "label",
          {},
          element("input", { type: "radio", name, checked: place === chosen, onchange: () => change(place) }),
          text,
        ),
      ),
    ),
  );
}

const tip = document.getElementById("tip");
function showTip(x, y, title, lines) {
  tip.replaceChildren(element("b", {}, title), ...lines.map((line) => element("span", {}, line)));
  tip.hidden = false;
  const box = tip.getBoundingClientRect(),
    margin = 8;
  const left = Math.min(Math.max(margin, x + 14), innerWidth - box.width - margin);
  const top = y + 18 + box.height > innerHeight - margin ? y - box.height - 14 : y + 18;
  tip.style.left = `${Math.max(margin, left)}px`;
  tip.style.top = `${Math.max(margin, top)}px`;
}
function hideTip() {
  tip.hidden = true;
}

function light(cell) {
  for (const node of document.querySelectorAll(".lit")) node.classList.remove("lit");
  if (cell) for (const node of document.querySelectorAll(`[data-cell="${cell}"]`)) node.classList.add("lit");
}
function joinCells(root) {
  for (const [enter, leave] of [
    ["pointerover", "pointerout"],
    ["focusin", "focusout"],
  ]) {
    root.addEventListener(enter, (event) => light(event.target.closest("[data-cell]")?.dataset.cell));
    root.addEventListener(leave, () => light(null));
  }
}

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
const listeners = [];
let printing = false;
function isDark() {
  if (printing) return false;
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : darkScheme.matches;
}
const redraw = () => listeners.forEach((listener) => listener());
function kept(theme) {
  // a page opened from a file may have no storage
  try {
    return theme ? localStorage.setItem("loraq-theme", theme) : localStorage.getItem("loraq-theme");
  } catch {
    return null;
  }
}
function startTheme() {
  const stored = kept();
  if (stored === "light" || stored === "dark") document.documentElement.dataset.theme = stored;
  document.getElementById("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    kept(document.documentElement.dataset.theme);
    redraw();
  });
  darkScheme.addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    printing = true;
    redraw();
  });
  addEventListener("afterprint", () => {
    printing = false;
    redraw();
  });
}
function onWidth(node, act) {
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth !== width) {
      width = node.clientWidth;
      act();
    }
  }).observe(node);
}

function copyButtons() {
  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.parentElement.querySelector("code");
      let done = true;
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch {
        // no clipboard for this page: select the text, which the old command may copy
        getSelection().selectAllChildren(code);
        done = document.execCommand("copy");
      }
      button.textContent = done ? "Copied" : "Selected";
      setTimeout(() => {
        button.textContent = "Copy";
      }, 1600);
    });
  }
}
