/**
 * The box on a picture that its crop is laid around.
 *
 * - moved by its inside, resized by its corners and edges, drawn anew anywhere on the picture
 * - by keys: arrows move it, Shift and arrows resize it, Ctrl makes steps small
 * - in parts of the picture, 0 to 1; `changed(box)` is called when it is let go, or when keys rest
 */

import { later, make, used } from "./dom.mjs";

const LEAST = 0.01;
const STEP = 0.02;
const FINE = 0.002;
const QUIET = 400; // milliseconds
const HANDLES = { nw: [0, 0], n: [0.5, 0], ne: [1, 0], e: [1, 0.5], se: [1, 1], s: [0.5, 1], sw: [0, 1], w: [0, 0.5] };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const clamp = (value, least, most) => Math.max(least, Math.min(most, value));

/** The box moved by so much, staying inside. */
export function movedBox([left, top, right, bottom], dx, dy) {
  const x = clamp(dx, -left, 1 - right);
  const y = clamp(dy, -top, 1 - bottom);
  return [left + x, top + y, right + x, bottom + y];
}

/** The box with the sides of a handle ("n", "se", …) moved by so much. */
export function resizedBox([left, top, right, bottom], handle, dx, dy) {
  return [
    handle.includes("w") ? clamp(left + dx, 0, right - LEAST) : left,
    handle.includes("n") ? clamp(top + dy, 0, bottom - LEAST) : top,
    handle.includes("e") ? clamp(right + dx, left + LEAST, 1) : right,
    handle.includes("s") ? clamp(bottom + dy, top + LEAST, 1) : bottom,
  ];
}

/** The box between two points, or null where it is too small to be meant. */
export function drawnBox([x0, y0], [x1, y1]) {
  const sides = [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
  const [left, top, right, bottom] = sides.map((side) => clamp(side, 0, 1));
  return right - left >= LEAST && bottom - top >= LEAST ? [left, top, right, bottom] : null;
}

const rounded = (box) => box.map((side) => Math.round(side * 1e4) / 1e4);

export class FocusBox {
  #sheet;
  #changed;
  #box = null;
  #drag = null;
  #shade = make("div", { className: "loom-focus-shade" });
  #clip = make("div", { className: "loom-focus-clip" }, this.#shade);
  #frame = make(
    "div",
    { className: "loom-focus", tabindex: "0", role: "group" },
    make("span", {}, "focus"),
    Object.entries(HANDLES).map(([name, [x, y]]) =>
      make("b", { data: { handle: name }, style: `left: ${100 * x}%; top: ${100 * y}%; cursor: ${name}-resize` }),
    ),
  );
  #rest = later(() => this.#changed(rounded(this.#box)), QUIET);

  /** On `sheet`, an element that the picture fills. */
  constructor(sheet, changed) {
    [this.#sheet, this.#changed] = [sheet, changed];
    sheet.append(this.#clip, this.#frame);
    this.#frame.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      used(event);
      this.#frame.focus();
      this.#begin(event, event.target.dataset.handle ?? "move", this.#box);
    });
    this.#frame.addEventListener("keydown", (event) => this.#key(event));
    this.show(null);
  }

  get isHeld() {
    return this.#drag !== null;
  }

  show(box) {
    if (this.isHeld) return;
    this.#rest.cancel();
    this.#place(box);
  }

  /** Begin a new box at a pointer's place; the pointer is followed until it is let go. */
  draw(event) {
    this.#begin(event, "draw", null);
  }

  #begin(event, how, box) {
    const from = this.#point(event);
    const before = this.#box;
    this.#drag = { how, from, box };
    const move = (moved) => this.#place(this.#dragged(this.#point(moved)) ?? before);
    const end = (last) => {
      for (const [name, listener] of listeners) this.#sheet.ownerDocument.removeEventListener(name, listener);
      this.#drag = null;
      if (last.type === "pointercancel") this.#place(before);
      else if (String(this.#box) !== String(before)) this.#changed(rounded(this.#box));
    };
    const listeners = [["pointermove", move], ["pointerup", end], ["pointercancel", end]];
    for (const [name, listener] of listeners) this.#sheet.ownerDocument.addEventListener(name, listener);
  }

  #dragged(point) {
    const { how, from, box } = this.#drag;
    const [dx, dy] = [point[0] - from[0], point[1] - from[1]];
    if (how === "draw") return drawnBox(from, point);
    return how === "move" ? movedBox(box, dx, dy) : resizedBox(box, how, dx, dy);
  }

  #point({ clientX, clientY }) {
    const { left, top, width, height } = this.#sheet.getBoundingClientRect();
    return [(clientX - left) / width, (clientY - top) / height];
  }

  #key(event) {
    const arrow = ARROWS[event.key];
    if (!arrow) return;
    used(event);
    const step = event.ctrlKey || event.metaKey ? FINE : STEP;
    const [dx, dy] = arrow.map((direction) => direction * step);
    this.#place(event.shiftKey ? resizedBox(this.#box, "se", dx, dy) : movedBox(this.#box, dx, dy));
    this.#rest();
  }

  #place(box) {
    this.#box = box;
    this.#frame.hidden = this.#clip.hidden = !box;
    if (!box) return;
    const [left, top, right, bottom] = box.map((side) => 100 * side);
    const place = { left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%` };
    Object.assign(this.#frame.style, place);
    Object.assign(this.#shade.style, place);
    const told = [left, top, right, bottom].map((side) => `${Math.round(side)}%`).join(", ");
    this.#frame.setAttribute("aria-label", `Focus: ${told}. Arrows move it, Shift and arrows resize it.`);
  }
}
