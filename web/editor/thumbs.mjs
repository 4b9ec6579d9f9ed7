/**
 * Small pictures, loaded when they are looked at.
 *
 * - a few at a time, in the order they came into view; the others of the browser's connections stay free for answers
 * - what has gone out of view before its turn is never asked for, and what is under way is given up
 * - a picture that fails (the server has too much to do) is asked for again, and then marked
 */

import { SIZES } from "./api.mjs";

const AT_ONCE = 4;
const AGAIN = [600, 2500]; // milliseconds

/** The smallest of the sizes there are that fills `edge` pixels of the page. */
export function sizeFor(edge, ratio = window.devicePixelRatio || 1) {
  return SIZES.find((size) => Number(size) >= edge * ratio * 0.9) ?? "384";
}

export class Thumbs {
  #waiting = new Map(); // image element: address
  #loading = new Map();

  /** Show the picture of that address in an image element; what it shows meanwhile stays. */
  show(image, address) {
    if (image.dataset.address === address) return;
    this.drop(image);
    image.dataset.address = address;
    this.#waiting.set(image, address);
    this.#next();
  }

  /** The element is not looked at any more. */
  drop(image) {
    this.#waiting.delete(image);
    delete image.dataset.address;
    const loader = this.#loading.get(image);
    if (!loader) return;
    this.#loading.delete(image);
    loader.removeAttribute("src");
    this.#next();
  }

  #next() {
    for (const [image, address] of this.#waiting) {
      if (this.#loading.size >= AT_ONCE) return;
      this.#waiting.delete(image);
      this.#load(image, address, 0);
    }
  }

  #load(image, address, attempt) {
    const loader = new Image();
    const isWanted = () => this.#loading.get(image) === loader;
    const done = () => {
      this.#loading.delete(image);
      this.#next();
    };
    this.#loading.set(image, loader);
    loader.onload = () => {
      if (!isWanted()) return;
      image.src = address; // from the browser's memory
      image.classList.add("there");
      image.parentElement?.classList.remove("failed");
      done();
    };
    loader.onerror = () => {
      if (!isWanted()) return;
      if (attempt < AGAIN.length) {
        setTimeout(() => isWanted() && this.#load(image, address, attempt + 1), AGAIN[attempt]);
      } else {
        image.parentElement?.classList.add("failed");
        done();
      }
    };
    loader.src = address;
  }
}
