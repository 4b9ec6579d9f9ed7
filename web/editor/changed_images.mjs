/**
 * The images whose captions or focus are not as they were read, a hundred at a time; each opens to what was there and
 * what is now.
 */

import { datasetPath, get } from "./api.mjs";
import { diffView } from "./diff.mjs";
import { button, make, many } from "./dom.mjs";
import { failed, showImages } from "./images.mjs";

const AT_ONCE = 100;
const MOST = 1000; // that the server tells at once

/** @param {import("./store.mjs").Store} store */
export function changedImages(store) {
  let [known, most, asked] = ["", AT_ONCE, 0];
  const list = make("ul", { className: "loom-changed" });
  const left = make("p", { className: "loom-faint" });
  const more = button("Show more", () => {
    most = Math.min(most + AT_ONCE, MOST);
    update().catch((error) => failed(store, error));
  });
  const element = make("div", { className: "loom-stack" }, list, left, more);

  const update = async () => {
    const { id, revision } = store.state;
    const key = `${id} ${revision} ${most}`;
    if (key === known) return;
    const number = ++asked;
    const { rows, total } = await get(datasetPath(id, "rows"), { changed: 1, count: most });
    if (number !== asked) return;
    known = key;
    const open = new Set([...list.querySelectorAll("details[open]")].map((each) => each.dataset.image));
    list.replaceChildren(...rows.map((row) => itemOf(row, open.has(row.id))));
    const hidden = total - rows.length;
    left.textContent = hidden ? `and ${many(hidden, "image")} more` : total ? "" : "none";
    more.hidden = !hidden || most >= MOST;
  };

  const itemOf = ({ id, name }, isOpen) => {
    const body = make("div", { className: "loom-changed-body" });
    const fill = async () => {
      const { before, caption } = await store.detail(id);
      const heads = [store.state.keeps === "files" ? "In its file" : "Before the program", "Now"];
      const focus = make("p", { className: "loom-faint" }, "Its crops are laid around another focus.");
      const show = button("Show", () => showImages(store, [id]), { className: "small", label: `Show ${name}` });
      body.replaceChildren(before === caption ? focus : diffView(before, caption, heads), show);
    };
    const toggled = () => {
      if (details.open && !body.childElementCount) fill().catch((error) => failed(store, error));
    };
    const details = make("details", { data: { image: id }, onToggle: toggled }, make("summary", {}, name), body);
    details.open = isOpen;
    return make("li", {}, details);
  };
  return { element, update };
}
