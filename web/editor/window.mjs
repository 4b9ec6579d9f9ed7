/**
 * The editor's window: over the whole page, with the pictures on the left and the panels on the right.
 *
 * - `openEditor({body, setProgram})` for what a node or the sidebar names, `openEditor({id})` for what is open already
 * - a real modal dialog: the focus stays inside and goes back where it was; Escape goes back layer by layer
 * - who leaves a folder with unwritten edits is asked: write them, keep the dataset open, or discard them
 */

import { addStyle } from "../styles.mjs";
import { Bar } from "./bar.mjs";
import { divided } from "./divider.mjs";
import { later, make, many } from "./dom.mjs";
import { Foot } from "./foot.mjs";
import { Grid } from "./grid.mjs";
import { holdHost, keepInside } from "./aside.mjs";
import { entryFor, isTyping, nameOf } from "./keys.mjs";
import { ask, showKeys } from "./layers.mjs";
import { addPanels } from "./panels.mjs";
import { Picture } from "./picture.mjs";
import { Store } from "./store.mjs";

const STYLES = new URL("./editor.css", import.meta.url).href;
const BEFORE_CHECK = 1500; // milliseconds after an edit, so that typing and clicking go first

let current = null;

/** Resolves when the dataset is shown; rejects with an Error to be shown. Another one that is open stays. */
export async function openEditor(what) {
  if (current) throw new Error("the editor is open already");
  await styled();
  current = new Editor();
  return current.open(what);
}

function styled() {
  const link = addStyle(STYLES);
  if (link.sheet) return null;
  return new Promise((resolve, reject) => {
    link.addEventListener("load", resolve);
    link.addEventListener("error", () => reject(new Error("the server does not answer: is ComfyUI still running?")));
  });
}

class Editor {
  store = new Store();
  bar = new Bar(this);
  picture = new Picture(this.store, { go: (where) => this.grid.step(where), closed: () => this.#backInGrid() });
  grid = new Grid(this.store, (id) => this.picture.open(id));
  #foot = new Foot(this.store);
  #column = make("aside", { className: "loom-column", "aria-label": "Panels" });
  #side = make("main", { className: "loom-side" }, this.grid.tools, this.grid.element, this.picture.element);
  #dialog = make(
    "dialog",
    { className: "loom-editor", role: "dialog", "aria-modal": "true", "aria-labelledby": "loom-editor-name" },
    this.bar.element,
    make("div", { className: "loom-middle" }, this.#side, divided(this.#column), this.#column),
    this.#foot.element,
  );
  #panels = addPanels(this.#column, this.store);
  #release = null;
  #closing = false;
  #check = later(() => this.store.state && this.store.findings().catch(() => {}), BEFORE_CHECK);

  async open({ body, setProgram, id }) {
    keepInside(this.#dialog);
    this.#dialog.addEventListener("keydown", (event) => this.#key(event));
    this.#dialog.addEventListener("cancel", (event) => event.preventDefault()); // Escape is a key of ours
    document.body.append(this.#dialog);
    this.#dialog.showModal();
    this.#release = holdHost();
    document.addEventListener("keydown", this.#stray, true);
    this.#foot.say({ text: "Opening …" });
    let failure = null;
    this.store.addEventListener("failed", ({ detail }) => (failure = detail), { once: true });
    const state = await (id ? this.store.attach(id) : this.store.open(body, setProgram));
    if (!state) {
      this.#leave();
      throw failure;
    }
    this.#foot.say({ text: state.notes.join("; ") || "? shows the keys" });
    this.store.addEventListener("state", () => this.#check());
    this.#check();
    this.grid.focus();
    return this;
  }

  // -- what keys and buttons do

  undo() {
    if (this.store.state?.can_undo) this.store.undo();
    else this.#foot.say({ text: "there is nothing to undo" });
  }

  redo() {
    if (this.store.state?.can_redo) this.store.redo();
    else this.#foot.say({ text: "there is nothing to redo" });
  }

  /** Whether all is written now. */
  async write() {
    const { keeps, unsaved } = this.store.state;
    if (keeps !== "files") return this.#foot.say({ text: "the node's program holds the edits: save the workflow" });
    if (!unsaved) return this.#foot.say({ text: "all captions are in their files" });
    const told = await this.store.write();
    if (told && !told.refused.length) return true;
    this.panel("write");
    return false;
  }

  panel(name, form) {
    this.#panels.show(name, form);
  }

  help() {
    showKeys(this.#dialog);
  }

  /** On to the next of pictures, panels and filter. */
  nextRegion(by) {
    const pictures = this.picture.isOpen ? this.picture.element : this.grid.element;
    const regions = [pictures, this.#column, this.bar.element];
    const now = regions.findIndex((region) => region.contains(document.activeElement));
    const next = (now + by + regions.length) % regions.length;
    if (next === 0) this.#focusPictures();
    else if (next === 1) this.#column.querySelector("[role=tab][aria-selected=true]")?.focus();
    else this.bar.focusFilter();
  }

  /** One layer back. */
  back() {
    if (this.bar.leaveOff() || this.picture.leaveOff()) return undefined;
    const focused = document.activeElement;
    if (isTyping(focused) || this.#column.contains(focused)) return this.#focusPictures();
    if (this.picture.isOpen) return this.picture.close();
    if (this.store.selection.size > 1) return this.store.select([]);
    return this.close();
  }

  async close() {
    if (this.#closing) return;
    this.#closing = true;
    try {
      await this.store.settled();
      const how = await this.#howToLeave();
      if (how === null || (how === "write" && !(await this.write()))) return;
      await this.store.close({ discard: how === "discard" });
      this.#leave();
    } finally {
      this.#closing = false;
    }
  }

  #howToLeave() {
    const { keeps, unsaved } = this.store.state ?? {};
    if (keeps !== "files" || !unsaved) return "keep";
    const text = `The captions of ${many(unsaved, "image")} are not in their files yet.`;
    return ask(this.#dialog, "Unwritten captions", text, [
      { text: "Write them", value: "write", className: "primary" },
      { text: "Keep it open in the background", value: "keep" },
      { text: "Discard the edits", value: "discard", className: "danger" },
    ]);
  }

  #leave() {
    this.#check.cancel();
    this.#panels.remove();
    this.#release();
    document.removeEventListener("keydown", this.#stray, true);
    this.#dialog.close();
    this.#dialog.remove();
    current = null;
  }

  #focusPictures() {
    if (this.picture.isOpen) this.picture.focus();
    else this.grid.focus();
  }

  #backInGrid() {
    this.grid.focus();
    this.grid.revealCursor();
  }

  #key(event) {
    if (event.defaultPrevented || event.target.closest("dialog") !== this.#dialog) return;
    if (isTyping(event.target) && event.key !== "Escape") return;
    this.#act(event, this.#place(event.target));
  }

  #act(event, place) {
    const entry = entryFor(event, place);
    if (!entry) return;
    event.preventDefault();
    entry.do(this, nameOf(event));
  }

  /** A key while nothing has the focus, because what had it is gone: the window's, not the host's. */
  #stray = (event) => {
    if (this.#dialog.contains(event.target)) return;
    event.stopPropagation();
    if (this.#dialog.querySelector("dialog[open]")) return;
    this.#focusPictures();
    this.#act(event, this.#place(this.#dialog));
  };

  /** Whose keys act: those of the pictures where the focus is in them, or nowhere in particular. */
  #place(target) {
    const isHere = this.#side.contains(target) || target === this.#dialog;
    return isHere ? (this.picture.isOpen ? "picture" : "grid") : undefined;
  }
}
