/**
 * The bar above the pictures: which dataset, a filter, how many images, undo and redo, what is not written, closing.
 *
 * - the filter acts while it is typed; what is wrong with it stands beneath it, examples behind the question mark
 * - "● 12 unwritten" for folders; a node's edits are in its program, which the workflow holds
 */

import { button, later, make, many } from "./dom.mjs";

const QUIET = 250; // milliseconds after a key

const EXAMPLES = [
  ["tag:cat", "has the tag cat"],
  ['tag:"long hair" AND NOT tag:hat', "one tag and not another"],
  ["tag:*hair OR tag:*eyes", "wildcards: * any letters, ? one"],
  ["tags:=0", "no tags yet"],
  ["tags:>20", "more than 20 tags; also < <= >= !="],
  ['caption:"a dog"', "these words anywhere in the caption"],
  ["name:img_0* OR path:cats", "by file name, by folder"],
  ["width:<512 OR height:<512", "small pictures"],
  ["lint:T020", "what a rule of the check finds"],
  ["(tag:cat OR tag:dog) AND NOT concept:regularisation", "brackets; concepts by name"],
];

export class Bar {
  #store;
  #told = ""; // the filter as the field and the store last agreed
  #name = make("h1", { className: "loom-bar-name", id: "loom-editor-name" });
  #error = make("div", { className: "loom-filter-error", id: "loom-filter-error", role: "alert", hidden: true });
  #examples;
  #field = make("input", {
    type: "search",
    className: "loom-field",
    placeholder: "Filter: tag:cat AND NOT path:dogs",
    "aria-label": "Filter",
    "aria-describedby": "loom-filter-error",
    spellcheck: "false",
    autocomplete: "off",
    onInput: () => this.#typed(),
    onKeydown: (event) => this.#key(event),
  });
  #more = button("?", () => this.#toggleExamples(), { className: "quiet", label: "Examples of filters" });
  #count = make("div", { className: "loom-bar-count", role: "status" });
  #changed;
  #undo;
  #redo;
  #mark = make("span", { className: "loom-bar-mark", role: "status" });
  #write;
  #typed = later(() => this.#apply(), QUIET);
  element;

  /** `editor` has undo, redo, write, help, close and grid. */
  constructor(editor) {
    this.editor = editor;
    this.#store = editor.store;
    const examples = EXAMPLES.map((row) => this.#example(row));
    this.#examples = make("div", { className: "loom-filter-help", hidden: true }, ...examples);
    this.#changed = button("Changed", () => this.#store.setOnlyChanged(!this.#store.onlyChanged), {
      label: "Only images that are changed (U)",
    });
    this.#undo = button("↶", () => editor.undo(), { className: "quiet", label: "Undo" });
    this.#redo = button("↷", () => editor.redo(), { className: "quiet", label: "Redo" });
    this.#write = button("Write", () => editor.write(), { className: "primary" });
    this.element = make(
      "header",
      { className: "loom-bar" },
      this.#name,
      make(
        "div",
        { className: "loom-bar-filter", role: "search" },
        this.#field,
        this.#more,
        this.#error,
        this.#examples,
      ),
      this.#changed,
      this.#count,
      make("div", { className: "loom-bar-space" }),
      this.#mark,
      this.#undo,
      this.#redo,
      this.#write,
      button("⌨", () => editor.help(), { className: "quiet", label: "Keys (?)" }),
      button("✕", () => editor.close(), { className: "quiet", label: "Close (Escape)" }),
    );
    for (const name of ["state", "rows", "selection"]) this.#store.addEventListener(name, () => this.#show());
  }

  focusFilter() {
    this.#field.focus();
    this.#field.select();
  }

  /** Close the examples; whether they were open. */
  leaveOff() {
    if (this.#examples.hidden) return false;
    this.#toggleExamples();
    return true;
  }

  #example([filter, what]) {
    const use = () => {
      this.#field.value = filter;
      this.#toggleExamples();
      this.#field.focus();
      this.#apply();
    };
    return make("button", { type: "button", onClick: use }, make("code", {}, filter), make("span", {}, what));
  }

  #toggleExamples() {
    this.#examples.hidden = !this.#examples.hidden;
    this.#more.setAttribute("aria-expanded", String(!this.#examples.hidden));
    this.#show();
  }

  #key(event) {
    if (event.key !== "Enter") return;
    event.preventDefault();
    this.#apply();
    this.editor.grid.focus();
  }

  #apply() {
    this.#typed.cancel();
    const text = this.#field.value.trim();
    if (text === this.#told) return;
    this.#told = text;
    this.#store.setFilter(text);
  }

  #show() {
    const { state, filter, filterError, total, selection, onlyChanged } = this.#store;
    if (!state) return;
    this.#name.textContent = this.#name.title = state.name;
    if (filter !== this.#told) this.#told = this.#field.value = filter; // somebody else set it
    this.#error.textContent = filterError;
    this.#error.hidden = !filterError || !this.#examples.hidden;
    this.#field.setAttribute("aria-invalid", String(Boolean(filterError)));
    this.#changed.setAttribute("aria-pressed", String(onlyChanged));
    const part = filter || onlyChanged ? `${total.toLocaleString("en")} of ` : "";
    const chosen = selection.size ? `, ${selection.size.toLocaleString("en")} selected` : "";
    this.#count.textContent = part + many(state.images, "image") + chosen;
    this.#showState(state);
  }

  #showState({ keeps, unsaved, edits, can_undo, can_redo, undo, redo }) {
    const isFolder = keeps === "files";
    this.#undo.disabled = !can_undo;
    this.#undo.title = undo ? `Undo ${undo} (Ctrl+Z)` : "Undo (Ctrl+Z)";
    this.#redo.disabled = !can_redo;
    this.#redo.title = redo ? `Redo ${redo} (Ctrl+Y)` : "Redo (Ctrl+Y)";
    this.#mark.dataset.kept = keeps;
    const written = unsaved ? `● ${unsaved.toLocaleString("en")} unwritten` : "";
    this.#mark.textContent = isFolder ? written : edits ? `${many(edits, "edit")} in the node` : "";
    this.#mark.title = isFolder ? "captions that are not in their files" : "its program holds them, and the workflow";
    this.#write.hidden = !isFolder;
    this.#write.disabled = !unsaved;
    this.#write.title = "Write captions into their files, after a backup (Ctrl+S)";
  }
}
