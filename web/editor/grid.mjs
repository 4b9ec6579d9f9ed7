/**
 * The grid of pictures.
 *
 * - only tiles in view are in the page, whatever the dataset's size; rows and pictures come when they are looked at
 * - click, Ctrl, Shift and a drawn rectangle select; keys move the cursor (see keys.mjs), Shift extends from the anchor
 * - zoom by the slider, Ctrl and wheel, + and −; captions beneath the pictures or not; both are remembered
 */

import { drawBand } from "./band.mjs";
import { make } from "./dom.mjs";
import { fullHeight, LARGEST, laidOut, placeOf, rowsIn, SMALLEST, visible, within } from "./layout.mjs";
import { remembered, remember } from "./memory.mjs";
import { Thumbs } from "./thumbs.mjs";
import { Tile } from "./tile.mjs";

const STEP = 1.2; // of the zoom
const USUAL = 150; // pixels

export class Grid {
  #store;
  #open;
  #tiles = new Map(); // by index
  #thumbs = new Thumbs();
  #layout = null;
  #edge = remembered("edge", USUAL, SMALLEST, LARGEST);
  #captions = remembered("captions", 1, 0, 1) === 1;
  #frame = 0;
  #anchor = null; // where a range begins: an id
  #asked = 0; // moves of the cursor: only the last one counts

  #space = make("div", { className: "loom-grid-space", role: "presentation" });
  #empty = make("div", { className: "loom-grid-empty", hidden: true });
  /** What takes the focus. */
  element = make(
    "div",
    { className: "loom-grid", tabindex: "0", role: "listbox", "aria-multiselectable": "true", "aria-label": "Images" },
    this.#space,
  );
  #zoom = make("input", {
    type: "range",
    min: SMALLEST,
    max: LARGEST,
    value: this.#edge,
    "aria-label": "Size of the pictures",
    onInput: () => this.resize(Number(this.#zoom.value)),
  });
  #showCaptions = make("input", { type: "checkbox", checked: this.#captions, onChange: () => this.toggleCaptions() });
  tools = make(
    "div",
    { className: "loom-tools" },
    make("label", { title: "Ctrl and the wheel, + and −" }, "Size ", this.#zoom),
    make("label", {}, this.#showCaptions, "Captions"),
  );

  /** `open(id)` shows an image large. */
  constructor(store, open) {
    [this.#store, this.#open] = [store, open];
    for (const name of ["rows", "state", "selection", "cursor"]) store.addEventListener(name, () => this.#soon());
    store.addEventListener("cursor", () => (this.#anchor ??= store.cursor));
    this.element.addEventListener("scroll", () => this.#soon(), { passive: true });
    this.element.addEventListener("dblclick", ({ target }) => this.#openTile(target));
    this.element.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    new ResizeObserver(() => this.#soon()).observe(this.element);
    drawBand(this.element, this.#space, {
      click: (event) => this.#click(event),
      touched: (box) => within(this.#layout, box, this.#store.total),
      select: (indices, event) => this.#selectPlaces(indices, event),
    });
    this.element.append(this.#empty);
  }

  // -- what keys and the window ask for

  focus() {
    this.element.focus({ preventScroll: true });
  }

  resize(edge) {
    this.#edge = Math.round(Math.max(SMALLEST, Math.min(LARGEST, edge)));
    this.#zoom.value = this.#edge;
    remember("edge", this.#edge);
    this.#keepingPlace(() => this.render());
  }

  zoom(steps) {
    this.resize(this.#edge * STEP ** steps);
  }

  toggleCaptions() {
    this.#captions = !this.#captions;
    this.#showCaptions.checked = this.#captions;
    remember("captions", Number(this.#captions));
    this.#keepingPlace(() => this.render());
  }

  /** The index that a step leads to: "left", "right", "up", "down", "page up", "page down", "start", "end". */
  async step(where, { extend = false, keep = false } = {}) {
    const { total, cursor } = this.#store;
    if (!total || !this.#layout) return;
    const mine = ++this.#asked;
    const now = cursor === null ? -1 : await this.#store.placeOf(cursor);
    const { columns } = this.#layout;
    const page = columns * rowsIn(this.#layout, this.element.clientHeight);
    const by = { left: -1, right: 1, up: -columns, down: columns, "page up": -page, "page down": page }[where];
    let index = where === "start" ? 0 : where === "end" ? total - 1 : now < 0 ? 0 : now + by;
    if (Math.abs(by) === columns && (index < 0 || index >= total)) index = now; // no row there
    index = Math.max(0, Math.min(total - 1, index));
    const id = await this.#store.idAt(index);
    if (mine !== this.#asked || id === null) return;
    this.#store.setCursor(id);
    if (extend) await this.#extend(index);
    else if (!keep) this.#chooseOnly(id);
    this.reveal(index);
  }

  toggle() {
    const { cursor } = this.#store;
    if (!cursor) return;
    this.#anchor = cursor;
    this.#store.select([cursor], "toggle");
  }

  async selectAll() {
    this.#store.select(await this.#store.idsOfFilter());
  }

  async revealCursor() {
    if (!this.#store.cursor) return;
    const index = await this.#store.placeOf(this.#store.cursor);
    if (index >= 0) this.reveal(index);
  }

  reveal(index) {
    if (!this.#layout) return;
    const { top } = placeOf(this.#layout, index);
    const [start, height] = [this.element.scrollTop, this.element.clientHeight];
    const gap = this.#layout.down - this.#layout.height;
    if (top - gap < start) this.element.scrollTop = top - gap;
    else if (top + this.#layout.down > start + height) this.element.scrollTop = top + this.#layout.down - height;
  }

  // -- showing

  #soon() {
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.render());
  }

  render() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const store = this.#store;
    if (!this.element.clientWidth) return;
    const { total } = store;
    const layout = (this.#layout = laidOut(this.element.clientWidth, this.#edge, this.#captions));
    this.#space.style.height = `${fullHeight(layout, total)}px`;
    this.#sayEmpty(total);
    const [first, last] = visible(layout, this.element.scrollTop, this.element.clientHeight, total);
    for (const [index, tile] of this.#tiles) if (index < first || index >= last) this.#remove(index, tile);
    const facts = { captions: this.#captions, edge: layout.edge, dataset: store.state?.id, thumbs: this.#thumbs };
    let active = null;
    for (let index = first; index < last; index++) {
      const row = store.row(index);
      const tile = this.#tiles.get(index) ?? this.#add(index);
      tile.place(index, total, placeOf(layout, index), layout);
      tile.show(row, { ...facts, badge: row && store.badge(row.id) });
      const isCursor = row !== undefined && row.id === store.cursor;
      tile.mark(row !== undefined && store.selection.has(row.id), isCursor);
      if (isCursor) active = tile.element.id;
    }
    if (active) this.element.setAttribute("aria-activedescendant", active);
    else this.element.removeAttribute("aria-activedescendant");
  }

  #add(index) {
    const tile = new Tile();
    this.#tiles.set(index, tile);
    this.#space.append(tile.element);
    return tile;
  }

  #remove(index, tile) {
    tile.clear(this.#thumbs);
    tile.element.remove();
    this.#tiles.delete(index);
  }

  #sayEmpty(total) {
    const { state, filter, onlyChanged } = this.#store;
    this.#empty.hidden = !state || total > 0;
    if (this.#empty.hidden) return;
    this.#empty.textContent = filter || onlyChanged ? "No image fits this filter." : "Loading …";
  }

  /** Keep what is in the middle of the window there while `change` changes sizes. */
  #keepingPlace(change) {
    const before = this.#layout;
    const middle = this.element.scrollTop + this.element.clientHeight / 2;
    const index = before ? Math.floor(middle / before.down) * before.columns : 0;
    change();
    if (!before || !this.#layout) return;
    this.element.scrollTop = placeOf(this.#layout, index).top - this.element.clientHeight / 2;
    this.render();
  }

  // -- the mouse

  #wheel(event) {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault(); // the browser would zoom the page
    this.zoom(event.deltaY < 0 ? 1 : -1);
  }

  #openTile(target) {
    const id = target.closest(".loom-tile")?.dataset.image;
    if (id) this.#open(id);
  }

  async #click({ target, ctrlKey, metaKey, shiftKey }) {
    const tile = target.closest(".loom-tile");
    const id = tile?.dataset.image;
    this.#asked++;
    if (!id) {
      if (!tile && !ctrlKey && !metaKey && !shiftKey) this.#store.select([]);
      return;
    }
    this.#store.setCursor(id);
    if (shiftKey) await this.#extend(Number(tile.dataset.index), ctrlKey || metaKey);
    else if (ctrlKey || metaKey) this.toggle();
    else this.#chooseOnly(id);
  }

  #chooseOnly(id) {
    this.#anchor = id;
    this.#store.select([id]);
  }

  /** Select from the anchor to an index. */
  async #extend(index, add = false) {
    const mine = this.#asked;
    const ids = await this.#store.idsOfFilter();
    const start = ids.indexOf(this.#anchor);
    if (mine !== this.#asked) return;
    const [first, last] = start < 0 ? [index, index] : [Math.min(start, index), Math.max(start, index)];
    this.#store.select(ids.slice(first, last + 1), add ? "add" : "only");
  }

  async #selectPlaces(indices, { ctrlKey, metaKey, shiftKey }) {
    const ids = await this.#store.idsOfFilter();
    const chosen = indices.map((index) => ids[index]).filter(Boolean);
    this.#store.select(chosen, ctrlKey || metaKey || shiftKey ? "add" : "only");
    if (!chosen.length) return;
    this.#store.setCursor(chosen.at(-1));
    this.#anchor = chosen[0];
  }
}
