/**
 * Where a picture lies: fitted into its window, zoomed around the mouse, moved by dragging.
 *
 * - wheel, + and − zoom; a double click goes between fitted and pixel for pixel
 * - what lies on the picture is laid out in parts of `sheet`, so that lines stay thin however large it is
 */

import { make } from "./dom.mjs";

const STEP = 1.25;
const MOST = 16; // pixels of the page for one of the picture
const MARGIN = 16;

export class Stage {
  #size = [1, 1];
  #scale = 1;
  #place = [0, 0];
  #fitted = true;
  sheet = make("div", { className: "loom-picture-sheet" });
  element = make("div", { className: "loom-picture-stage", tabindex: "-1" }, this.sheet);

  /** `press(event)` may take a press of the mouse for itself by returning true. */
  constructor(press) {
    this.element.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 1 : -1, event);
    }, { passive: false });
    this.element.addEventListener("pointerdown", (event) => {
      if (event.button === 2) return;
      if (!press(event)) this.#pan(event);
    });
    this.element.addEventListener("dblclick", (event) => (this.#fitted ? this.#zoomTo(1, event) : this.fit()));
    new ResizeObserver(() => this.#fitted && this.fit()).observe(this.element);
  }

  /** Fit a picture of so many pixels in. */
  show(width, height) {
    this.#size = [width, height];
    this.fit();
  }

  fit() {
    const { clientWidth, clientHeight } = this.element;
    if (!clientWidth) return;
    this.#fitted = true;
    this.#scale = this.#fitting();
    this.#place = [0, 1].map((axis) => ([clientWidth, clientHeight][axis] - this.#size[axis] * this.#scale) / 2);
    this.#lay();
  }

  zoom(steps, at) {
    this.#zoomTo(this.#scale * STEP ** steps, at);
  }

  #fitting() {
    const room = [this.element.clientWidth, this.element.clientHeight];
    return Math.max(0.01, Math.min(...room.map((length, axis) => (length - 2 * MARGIN) / this.#size[axis]), MOST));
  }

  #zoomTo(wanted, at) {
    const { left, top, width, height } = this.element.getBoundingClientRect();
    const least = Math.min(1, this.#fitting());
    const scale = Math.max(least / 2, Math.min(MOST, wanted));
    const point = at ? [at.clientX - left, at.clientY - top] : [width / 2, height / 2];
    this.#place = this.#place.map((start, axis) => point[axis] - ((point[axis] - start) * scale) / this.#scale);
    this.#scale = scale;
    this.#fitted = false;
    this.#lay();
  }

  #pan(event) {
    const [start, from] = [this.#place, [event.clientX, event.clientY]];
    const move = ({ clientX, clientY }) => {
      this.#place = [start[0] + clientX - from[0], start[1] + clientY - from[1]];
      this.#fitted = false;
      this.element.classList.add("panning");
      this.#lay();
    };
    const end = () => {
      this.element.classList.remove("panning");
      this.element.removeEventListener("pointermove", move);
    };
    this.element.setPointerCapture(event.pointerId);
    this.element.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) this.element.addEventListener(name, end, { once: true });
  }

  #lay() {
    const [left, top] = this.#place;
    const [width, height] = this.#size.map((length) => length * this.#scale);
    const lengths = { left, top, width, height };
    for (const [name, length] of Object.entries(lengths)) this.sheet.style[name] = `${length}px`;
  }
}
