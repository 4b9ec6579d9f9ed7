/**
 * One tile of the grid: picture, badge of what the check found, mark of a change, name, first lines of the caption.
 */

import { pictureAddress } from "./api.mjs";
import { many, make } from "./dom.mjs";
import { sizeFor } from "./thumbs.mjs";

const SIGNS = { error: "✕", warn: "!", info: "i" };

export class Tile {
  #image = make("img", { alt: "", draggable: "false", decoding: "async" });
  #badge = make("span", { className: "loom-tile-badge", hidden: true });
  #picture = make("div", { className: "loom-tile-picture" }, this.#image, this.#badge);
  #changed = make("span", { className: "loom-tile-changed", hidden: true });
  #name = make("span");
  #caption = make("div", { className: "loom-tile-caption" });
  #shown = "";
  element = make(
    "div",
    { className: "loom-tile", role: "option" },
    this.#picture,
    make("div", { className: "loom-tile-name" }, this.#changed, this.#name),
    this.#caption,
  );

  /** Lay it out: its place among `total`, and the grid's layout. */
  place(index, total, { left, top }, { width, height, edge }) {
    const { style } = this.element;
    [style.width, style.height] = [`${width}px`, `${height}px`];
    style.transform = `translate(${left}px, ${top}px)`;
    [this.#picture.style.width, this.#picture.style.height] = [`${edge}px`, `${edge}px`];
    this.element.id = `loom-tile-${index}`;
    this.element.dataset.index = index;
    this.element.setAttribute("aria-setsize", total);
    this.element.setAttribute("aria-posinset", index + 1);
  }

  /** What it shows; `row` is undefined while it is fetched. */
  show(row, { badge, captions, edge, dataset, thumbs }) {
    const facts = JSON.stringify([row?.id, row?.version, row?.caption, row?.changed, badge, captions, edge, dataset]);
    if (facts === this.#shown) return;
    this.#shown = facts;
    this.element.dataset.image = row?.id ?? "";
    this.#name.textContent = row?.name.split("/").at(-1) ?? "…";
    this.#caption.textContent = row?.caption ?? "";
    this.#caption.hidden = !captions;
    this.#changed.hidden = !row?.changed;
    this.#badge.hidden = !badge;
    if (!row) return this.clear(thumbs);
    const found = badge ? `, ${many(badge.count, "finding")}` : "";
    const label = `${row.name}${row.changed ? ", changed" : ""}${found}`;
    this.element.setAttribute("aria-label", label);
    this.element.title = row.changed ? `${row.name}\nits caption is not in its file` : row.name;
    if (badge) {
      this.#badge.textContent = `${SIGNS[badge.level] ?? ""} ${badge.count}`;
      this.#badge.dataset.level = badge.level;
      this.#badge.title = many(badge.count, "finding");
    }
    const address = pictureAddress(dataset, row, sizeFor(edge));
    if (this.#image.dataset.image !== row.id) this.#image.classList.remove("there");
    this.#image.dataset.image = row.id;
    thumbs.show(this.#image, address);
  }

  mark(selected, isCursor) {
    this.element.setAttribute("aria-selected", String(selected));
    this.element.classList.toggle("cursor", isCursor);
  }

  /** It has left the page, or what it shows is not there yet. */
  clear(thumbs) {
    thumbs.drop(this.#image);
    this.#image.classList.remove("there");
  }
}
