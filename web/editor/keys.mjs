/**
 * Every key of the editor, in one table, which the help shows too: {keys, what, where, do}.
 *
 * - `where`: "grid" or "picture" for keys of these alone; others act wherever the focus is
 * - keys never act while something is typed, and Enter and Space leave buttons alone
 * - undo, find, replace, sort, duplicates and zoom are where the common caption managers have them
 */

const ARROWS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down" };
const STEPS = { ...ARROWS, PageUp: "page up", PageDown: "page down", Home: "start", End: "end" };
const SIGNS = { ArrowLeft: "←", ArrowRight: "→", ArrowUp: "↑", ArrowDown: "↓", PageUp: "Page ↑", PageDown: "Page ↓" };
const NOT_TYPED = new Set(["button", "checkbox", "radio", "range", "color", "file", "reset", "submit"]);
const PRESSES = new Set(["Enter", "Space"]);

const entry = (where) => (keys, what, act) => ({ keys: keys.split(" "), what, where, do: act });
const [inPicture, inGrid, anywhere] = ["picture", "grid", undefined].map(entry);
const told = (keys, what) => ({ keys: [keys], what, where: "grid", shownOnly: true });
const step = (key, how) => (editor) => editor.grid.step(STEPS[key], how);
const turn = (editor, key) => editor.grid.step(STEPS[key]);

export const KEYS = [
  inPicture("ArrowLeft ArrowRight", "the picture before, the next one", turn),
  inPicture("ArrowUp", "", step("ArrowLeft")),
  inPicture("ArrowDown", "", step("ArrowRight")),
  inPicture("Home End", "the first, the last picture", turn),
  inPicture("F", "draw a focus box; arrows move it, with Shift resize it", ({ picture }) => picture.toggleDrawing()),
  inPicture("Delete", "clear the focus box", ({ picture }) => picture.clearFocus()),
  inPicture("C", "what of it is trained", ({ picture }) => picture.toggleCrops()),
  inPicture("M Ctrl+M", "its mask", ({ picture }) => picture.toggleMask()),
  inPicture("+", "larger", ({ picture }) => picture.zoom(1)),
  inPicture("-", "smaller", ({ picture }) => picture.zoom(-1)),
  inPicture("0", "fit into the window", ({ picture }) => picture.fit()),
  inPicture("Enter", "back to the grid", ({ picture }) => picture.close()),

  ...Object.keys(STEPS).flatMap((key) => [
    inGrid(key, "", step(key)),
    inGrid(`Shift+${key}`, "", step(key, { extend: true })),
    inGrid(`Ctrl+${key}`, "", step(key, { keep: true })),
  ]),
  told("← → ↑ ↓", "move and select; Page ↑ ↓, Home and End too"),
  told("Shift+←", "select from where it began"),
  told("Ctrl+←", "move only"),
  inGrid("Space Ctrl+Space", "select it, or not", ({ grid }) => grid.toggle()),
  inGrid("Enter", "show it large", ({ picture, store }) => picture.open(store.cursor)),
  inGrid("+", "larger pictures", ({ grid }) => grid.zoom(1)),
  inGrid("-", "smaller pictures", ({ grid }) => grid.zoom(-1)),
  inGrid("C", "captions beneath the pictures", ({ grid }) => grid.toggleCaptions()),

  anywhere("Ctrl+A", "select all that the filter shows", ({ grid }) => grid.selectAll()),
  anywhere("Ctrl+Shift+A", "select none", ({ store }) => store.select([])),
  anywhere("Ctrl+F /", "filter", ({ bar }) => bar.focusFilter()),
  anywhere("U", "only what is changed, or all", ({ store }) => store.setOnlyChanged(!store.onlyChanged)),
  anywhere("Ctrl+Z", "undo", (editor) => editor.undo()),
  anywhere("Ctrl+Y Ctrl+Shift+Z", "redo", (editor) => editor.redo()),
  anywhere("Ctrl+S", "write captions into their files", (editor) => editor.write()),
  anywhere("T Insert", "add tags", (editor) => editor.panel("caption", "add")),
  anywhere("Ctrl+G", "rename a tag", (editor) => editor.panel("bulk", "rename")),
  anywhere("Ctrl+R", "find and replace", (editor) => editor.panel("bulk", "replace")),
  anywhere("Ctrl+B Ctrl+Q", "sort tags", (editor) => editor.panel("bulk", "sort")),
  anywhere("Ctrl+D", "remove duplicates", (editor) => editor.panel("bulk", "remove duplicates")),
  anywhere("Ctrl+L", "what the check found", (editor) => editor.panel("findings")),
  anywhere("F6", "on to the pictures, the panels, the filter", (editor) => editor.nextRegion(1)),
  anywhere("Shift+F6", "and back", (editor) => editor.nextRegion(-1)),
  anywhere("? F1", "these keys", (editor) => editor.help()),
  anywhere("Escape", "back, and in the end close", (editor) => editor.back()),
];

/** Headings of the help, in its order. */
export const PLACES = [["grid", "Grid"], ["picture", "One picture"], [undefined, "Everywhere"]];

/** What a key is called in the help. */
export const spoken = (name) => name.replace(/[A-Z][A-Za-z]+$/, (key) => SIGNS[key] ?? key);

/** What a key event is called in the table: "Ctrl+Shift+Z", "Shift+ArrowLeft", "?". */
export function nameOf({ key, ctrlKey, metaKey, altKey, shiftKey }) {
  const isLetter = /^\p{L}$/u.test(key);
  const plain = key === " " ? "Space" : isLetter ? key.toUpperCase() : key;
  const shift = shiftKey && (key.length > 1 || key === " " || isLetter); // a sign has its Shift already
  return [ctrlKey || metaKey ? "Ctrl+" : "", altKey ? "Alt+" : "", shift ? "Shift+" : "", plain].join("");
}

/** Whether keys go into what has the focus. */
export function isTyping(element) {
  if (element.isContentEditable || ["TEXTAREA", "SELECT"].includes(element.tagName)) return true;
  return element.tagName === "INPUT" && !NOT_TYPED.has(element.type);
}

/** The entry for a key event at a place ("grid", "picture" or undefined); undefined where there is none. */
export function entryFor(event, place) {
  const name = nameOf(event);
  const isPressed = event.target.closest("button, a, input, summary, [role=tab], [role=button]");
  if (PRESSES.has(name) && isPressed) return undefined;
  return KEYS.find(({ keys, where, shownOnly }) => !shownOnly && keys.includes(name) && (!where || where === place));
}
