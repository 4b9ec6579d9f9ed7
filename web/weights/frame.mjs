/**
 * The elements of the weights' panel, without any behaviour of their own save opening and closing.
 *
 * - closed it is one line with the weights in short; open it shows bars, curve and what stays text
 */

import { UNITS } from "./curve.mjs";
import { make } from "./dom.mjs";

const BLENDS = { hold: "hold", linear: "linear", cosine: "cosine" };

/**
 * `fitted(isByUser)` is called when the height may have changed, `opened(isOpen)` when the user opens or closes the panel.
 */
export function makeFrame({ fitted, opened }) {
  const chevron = make("span", "loom-weights-chevron", { text: "▸", "aria-hidden": "true" });
  const label = make("span", "loom-weights-label", { text: "weights" });
  const short = make("span", "loom-weights-short", { text: "…" });
  const line = make("button", "loom-weights-line", { type: "button", "aria-expanded": "false" }, chevron, label, short);

  const target = make("span", "loom-weights-target", { text: "blocks" });
  const number = make("input", "loom-weights-number-input", {
    type: "text",
    inputmode: "decimal",
    "aria-label": "Weight of what is chosen",
    title: "Type a weight; Enter takes it",
  });
  const soloButton = button("Solo", "All other blocks get 0; again: back to what was (S)");
  const reset = button("Reset", "All weights are 1 again; what is kept as text stays");
  const presets = make("select", "loom-weights-select", {
    "aria-label": "Presets of block weights",
    title: "Presets; your own stand in user/lora_loom/block_presets.txt",
  });
  const tools = make("div", "loom-weights-tools", {}, target, number, soloButton, reset, presets);
  const rows = make("div", "loom-weights-holder");

  const keptHead = make("div", "loom-weights-small", { text: "Kept as text, since no bar can show it:" });
  const keptList = make("ul", "loom-weights-list");
  const kept = make("div", "loom-weights-kept", {}, keptHead, keptList);
  const hint = make("div", "loom-weights-small");
  const notes = make("ul", "loom-weights-notes");

  const unit = choice("How the points are counted", UNITS);
  const how = choice("Between two points", BLENDS);
  const point = make("input", "loom-weights-point-input", {
    type: "text",
    "aria-label": "The chosen point, as weight@place",
    title: "The chosen point as text: 0.6@6, 0.6@50%, 0.6@s2.5",
    placeholder: "0.6@6",
  });
  const add = button("+", "Add a point where there is most room");
  add.setAttribute("aria-label", "Add a point");
  const remove = button("−", "Remove the chosen point (Delete)");
  remove.setAttribute("aria-label", "Remove the chosen point");
  const title = make("span", "loom-weights-target", { text: "steps" });
  const runTools = make("div", "loom-weights-tools", {}, title, point, add, remove, how, unit);
  const curve = make("div", "loom-weights-holder");
  const mixed = make("div", "loom-weights-small", {
    text: "These points are counted by different clocks: change them in the text.",
  });
  const run = make("div", "loom-weights-run", {}, runTools, curve, mixed);
  const fault = make("div", "loom-weights-fault", { role: "alert" });

  const body = make("div", "loom-weights-body", {}, fault, tools, rows, kept, hint, notes, run);
  const content = make("div", "loom-weights-content", {}, line, body);
  const element = make("div", "loom-weights", {}, content);
  number.disabled = soloButton.disabled = point.disabled = remove.disabled = true;
  body.hidden = fault.hidden = kept.hidden = notes.hidden = mixed.hidden = true;

  const open = (isOpen, isByUser = false) => {
    body.hidden = !isOpen;
    line.setAttribute("aria-expanded", String(isOpen));
    chevron.textContent = isOpen ? "▾" : "▸";
    fitted(isByUser);
  };
  line.addEventListener("click", () => {
    open(body.hidden, true);
    opened(!body.hidden);
  });
  for (const field of [number, point]) {
    field.addEventListener("focus", () => field.select());
    field.addEventListener("keydown", (event) => event.stopPropagation()); // no key of the graph's while one types
  }
  for (const part of [tools, runTools, kept]) {
    for (const kind of ["pointerdown", "pointermove"]) part.addEventListener(kind, (event) => event.stopPropagation());
  }

  // Vue's nodes hand the wheel on to the canvas, save where an element asks for it
  element.addEventListener("focusin", () => element.setAttribute("data-capture-wheel", "true"));
  element.addEventListener("focusout", () => element.removeAttribute("data-capture-wheel"));

  list([]);
  function list(known) {
    const first = make("option", "", { text: "Presets", value: "" });
    const options = known.map(({ name, fits }) => {
      const option = make("option", "", { text: fits === false ? `${name} (not for this model)` : name, value: name });
      option.disabled = fits === false;
      return option;
    });
    presets.replaceChildren(first, ...options);
  }
  const keep = (parts) => {
    kept.hidden = !parts.length;
    keptList.replaceChildren(
      ...parts.map(({ text, fault: why }) => {
        const item = make("li", "", { text });
        if (why) item.append(make("span", "loom-weights-small", { text: ` — ${why}` }));
        return item;
      }),
    );
  };
  const say = (lines) => {
    notes.hidden = !lines.length;
    notes.replaceChildren(...lines.map((text) => make("li", "", { text })));
  };
  const summarise = (text, isFault) => {
    short.textContent = text;
    line.title = `weights: ${text}`;
    line.toggleAttribute("data-fault", isFault);
    label.textContent = isFault ? "✕ weights" : "weights";
    fitted();
  };
  return {
    ...{ element, content, line, target, number, solo: soloButton, reset, presets, tools, rows, hint },
    ...{ unit, how, point, add, remove, curve, mixed, run, fault, open, list, keep, say, summarise, fitted },
  };
}

function button(text, title) {
  return make("button", "loom-weights-button", { type: "button", text, title });
}

function choice(label, entries) {
  const options = Object.entries(entries).map(([value, text]) => make("option", "", { text, value }));
  return make("select", "loom-weights-select", { "aria-label": label, title: label }, ...options);
}
