/**
 * One picture, large, in place of the grid.
 *
 * - what of it is trained, for every resolution; its mask; the focus box, drawn, dragged, cleared
 * - the picture before and behind, by keys too; it follows the cursor, and the cursor follows it
 */

import { maskAddress, pictureAddress } from "./api.mjs";
import { button, make } from "./dom.mjs";
import { FocusBox } from "./focus_box.mjs";
import { remember, remembered } from "./memory.mjs";
import { Stage } from "./stage.mjs";

const COLOURS = ["--loom-accent", "--loom-warn", "--loom-ok", "--loom-error", "--loom-text"];

export class Picture {
  #store;
  #id = null;
  #address = "";
  #showCrops = remembered("crops", 1, 0, 1) === 1;
  #showMask = remembered("mask", 0, 0, 1) === 1;
  #drawing = false;
  #stage = new Stage((event) => this.#press(event));
  #small = make("img", { className: "small", alt: "", draggable: "false" });
  #large = make("img", { alt: "", draggable: "false" });
  #mask = make("img", { className: "mask", alt: "", draggable: "false", hidden: true });
  #crops = make("div");
  #focus;
  #name = make("div", { className: "loom-picture-name", "aria-live": "polite" });
  #cropButton = button("Crops", () => this.toggleCrops(), { label: "Show what of it is trained (C)" });
  #maskButton = button("Mask", () => this.toggleMask(), { label: "Show its mask (M)" });
  #focusButton = button("Focus", () => this.toggleDrawing(), { label: "Draw a focus box (F)" });
  #clearButton = button("Clear focus", () => this.clearFocus(), { label: "Clear the focus box (Delete)" });
  #note = make("small");
  element;

  /** `go(where)` moves the cursor ("left", "right"), `closed()` is called when the grid is back. */
  constructor(store, { go, closed }) {
    this.#store = store;
    this.closed = closed;
    this.#stage.sheet.append(this.#small, this.#large, this.#mask, this.#crops);
    this.#focus = new FocusBox(this.#stage.sheet, (box) => this.#setFocus(box));
    this.#stage.element.setAttribute("aria-label", "Picture");
    this.element = make(
      "div",
      { className: "loom-picture", hidden: true },
      make(
        "div",
        { className: "loom-picture-bar" },
        button("←", () => go("left"), { label: "The picture before (←)" }),
        button("→", () => go("right"), { label: "The next picture (→)" }),
        this.#name,
        this.#note,
        this.#cropButton,
        this.#maskButton,
        this.#focusButton,
        this.#clearButton,
        button("−", () => this.zoom(-1), { label: "Smaller (−)" }),
        button("Fit", () => this.fit(), { label: "Fit into the window (0)" }),
        button("+", () => this.zoom(1), { label: "Larger (+)" }),
        button("Grid", () => this.close(), { label: "Back to the grid (Escape)" }),
      ),
      this.#stage.element,
    );
    store.addEventListener("cursor", () => this.isOpen && this.#follow());
    for (const name of ["rows", "state"]) store.addEventListener(name, () => this.isOpen && this.#refresh());
  }

  get isOpen() {
    return !this.element.hidden;
  }

  open(id) {
    if (!id) return;
    this.element.hidden = false;
    this.#store.setCursor(id);
    this.#store.select([id]); // what is seen is what the panels edit
    this.#follow();
    this.focus();
  }

  focus() {
    this.#stage.element.focus();
  }

  close() {
    if (!this.isOpen) return;
    this.element.hidden = true;
    this.#forget();
    this.closed();
  }

  zoom(steps) {
    this.#stage.zoom(steps);
  }

  fit() {
    this.#stage.fit();
  }

  toggleCrops() {
    this.#showCrops = !this.#showCrops;
    remember("crops", Number(this.#showCrops));
    this.#refresh();
  }

  toggleMask() {
    this.#showMask = !this.#showMask;
    remember("mask", Number(this.#showMask));
    this.#refresh();
  }

  toggleDrawing() {
    this.#drawing = !this.#drawing;
    this.#focusButton.setAttribute("aria-pressed", String(this.#drawing));
    this.#stage.element.classList.toggle("drawing", this.#drawing);
  }

  clearFocus() {
    if (!this.#clearButton.disabled) this.#store.focus(this.#id, null);
  }

  /** Leave off drawing; whether there was something to leave off. */
  leaveOff() {
    if (this.#drawing) this.toggleDrawing();
    else return false;
    return true;
  }

  #press(event) {
    if (!this.#drawing || event.button) return false;
    event.preventDefault();
    this.#focus.draw(event);
    return true;
  }

  async #setFocus(box) {
    if (this.#drawing) this.toggleDrawing();
    const done = await this.#store.focus(this.#id, box);
    if (!done) this.#refresh(); // as it was
  }

  #forget() {
    [this.#id, this.#address] = [null, ""];
    for (const image of [this.#small, this.#large, this.#mask]) image.removeAttribute("src");
  }

  #follow() {
    const { cursor } = this.#store;
    if (!cursor) return this.close();
    if (cursor !== this.#id) {
      this.#forget();
      this.#id = cursor;
    }
    this.#refresh();
  }

  async #refresh() {
    const id = this.#id;
    try {
      const detail = await this.#store.detail(id);
      if (id === this.#id && this.isOpen) this.#show(detail);
    } catch (error) {
      if (id === this.#id && this.isOpen) this.#name.replaceChildren(error.message);
    }
  }

  #show(detail) {
    const dataset = this.#store.state.id;
    const address = pictureAddress(dataset, detail, "full");
    if (address !== this.#address) {
      this.#address = address;
      this.#small.src = pictureAddress(dataset, detail, "384");
      this.#small.hidden = false;
      this.#large.src = address;
      this.#large.decode().then(
        () => (this.#small.hidden = this.#address === address),
        () => {}, // another picture meanwhile
      );
      this.#large.alt = detail.name;
      this.#stage.show(...detail.size);
    }
    const [width, height] = detail.size;
    this.#name.replaceChildren(detail.name, make("small", {}, `${width} × ${height}`));
    this.#showMaskOf(detail, dataset);
    this.#showCropsOf(detail);
    this.#focus.show(detail.focus);
    this.#clearButton.disabled = !detail.focus;
    this.#note.textContent = this.#hint(detail);
  }

  #showMaskOf(detail, dataset) {
    this.#maskButton.disabled = !detail.mask;
    this.#maskButton.setAttribute("aria-pressed", String(this.#showMask && detail.mask));
    this.#mask.hidden = !(detail.mask && this.#showMask);
    if (!this.#mask.hidden) this.#mask.src = maskAddress(dataset, detail, "full");
  }

  #showCropsOf({ crops }) {
    this.#cropButton.setAttribute("aria-pressed", String(this.#showCrops));
    const shown = this.#showCrops ? crops : [];
    this.#crops.replaceChildren(
      ...shown.map(({ bucket, box: [left, top, right, bottom] }, index) => {
        const label = make("span", {}, bucket.join(" × "));
        const crop = make("div", { className: "loom-crop", title: "what is trained" }, label);
        const sides = { left, top, width: right - left, height: bottom - top };
        for (const [name, part] of Object.entries(sides)) crop.style[name] = `${100 * part}%`;
        crop.style.setProperty("--loom-colour", `var(${COLOURS[index % COLOURS.length]})`);
        label.style.bottom = `${18 * index}px`; // of equal crops all are told
        return crop;
      }),
    );
  }

  /** What a focus box needs to have an effect. */
  #hint({ focus, concept }) {
    if (!focus) return "";
    const { concepts, keeps } = this.#store.state;
    if (!concepts[concept]?.focused) return "crops do not heed the focus: set crop to focus in Image Settings";
    return keeps === "files" ? "focus boxes are kept by a Tag Editor, not in files" : "";
  }
}
