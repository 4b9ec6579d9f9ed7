/**
 * What lies over the editor for a moment: a question with its answers, the table of keys.
 *
 * - real dialogs: the focus stays inside and goes back where it was, Escape leaves them
 */

import { button, make, used } from "./dom.mjs";
import { KEYS, PLACES, spoken } from "./keys.mjs";

function shown(parent, label, ...content) {
  const dialog = make("dialog", { className: "loom-dialog", "aria-label": label }, ...content.flat());
  parent.append(dialog);
  dialog.addEventListener("close", () => dialog.remove());
  dialog.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    used(event); // a browser may ask more of an Escape that nobody has clicked before
    dialog.close();
  });
  dialog.showModal();
  dialog.scrollTop = 0; // the focus may be at the end
  return dialog;
}

/** Resolves to the value of the answer, or to null. `answers`: [{text, value, className}], the first has the focus. */
export function ask(parent, title, text, answers) {
  return new Promise((resolve) => {
    let given = null;
    const answer = (value) => {
      given = value;
      dialog.close();
    };
    const buttons = [...answers, { text: "Cancel", value: null }].map(({ text: face, value, className }, index) =>
      button(face, () => answer(value), { className, ...(index ? {} : { autofocus: "" }) }),
    );
    const dialog = shown(
      parent,
      title,
      make("h2", {}, title),
      make("p", {}, text),
      make("div", { className: "loom-dialog-buttons" }, ...buttons),
    );
    dialog.addEventListener("close", () => resolve(given));
  });
}

export function showKeys(parent) {
  const dialog = shown(
    parent,
    "Keys",
    make("h2", {}, "Keys"),
    make("div", { className: "loom-keys" }, ...PLACES.map(([place, title]) => section(place, title))),
    make(
      "div",
      { className: "loom-dialog-buttons" },
      button("Close", () => dialog.close(), { autofocus: "" }),
    ),
  );
  dialog.classList.add("wide");
}

function section(place, title) {
  const rows = KEYS.filter(({ what, where }) => what && where === place);
  const list = rows.flatMap(({ keys, what }) => [
    make("dt", {}, ...keys.flatMap((key, index) => [index ? " " : "", make("kbd", {}, spoken(key))])),
    make("dd", {}, what),
  ]);
  return make("section", {}, make("h3", {}, title), make("dl", {}, ...list));
}
