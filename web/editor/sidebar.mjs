/**
 * The sidebar: every folder that can be edited, with what is open already, and the Tag Editors that have run.
 *
 * - what has unwritten edits comes first, with a mark; typing in the field narrows the list
 * - asked anew whenever the tab is shown, and by a button
 */

import { nodeOf } from "../graph.mjs";
import { addStyle } from "../styles.mjs";
import { get } from "./api.mjs";
import { button, make, many } from "./dom.mjs";
import { bodyOf, isEditor, programOf } from "./nodes.mjs";

const STYLES = new URL("./sidebar.css", import.meta.url).href;
const NONE =
  "No folder with images yet: put one into ComfyUI's datasets or input folder, or drop pictures on a Dataset Loader.";

/** `open(what)` opens the window. */
export function showSidebar(element, open) {
  addStyle(STYLES);
  const list = make("div", { className: "loom-sidebar-list" });
  const search = make("input", {
    type: "search",
    placeholder: "Find a folder",
    "aria-label": "Find a folder",
    onInput: () => narrow(list, search.value),
    onKeydown: (event) => event.stopPropagation(), // typed here, not the graph's keys
  });
  const refresh = async () => {
    try {
      list.replaceChildren(...sections(await get("/datasets"), open));
    } catch (error) {
      list.replaceChildren(make("p", { role: "alert" }, error.message));
    }
    narrow(list, search.value);
  };
  const again = button("↻", refresh, { className: "quiet", label: "Look again" });
  const head = make("div", { className: "loom-sidebar-head" }, search, again);
  element.replaceChildren(make("div", { className: "loom-sidebar" }, make("h2", {}, "Captions"), head, list));
  refresh();
}

function sections({ open: opened, roots, nodes }, open) {
  const folders = opened.filter(({ keeps }) => keeps !== "program");
  const isOpen = new Set(folders.map(({ name }) => name));
  folders.sort((one, other) => other.unsaved - one.unsaved);
  const closed = Object.entries(roots).map(([root, names]) => {
    const left = names.filter((name) => !isOpen.has(`${root}/${name}`));
    return [root, left.map((folder) => item(folder, "", () => open({ body: { root, folder } })))];
  });
  const editors = nodes.map((each) => ({ ...each, of: nodeOf(each.node) })).filter(({ of }) => isEditor(of));
  const rows = [
    ["Open", folders.map((each) => item(each.name, stateOf(each), () => open({ id: each.id }), each.unsaved > 0))],
    ["Tag Editors", editors.map(({ of, node, name, images }) => {
      const what = () => open({ body: bodyOf(of), setProgram: programOf(of) });
      return item(`${of.title || "Tag Editor"} #${node}`, `${name}, ${many(images, "image")}`, what);
    })],
    ...closed,
  ];
  const found = rows.filter(([, items]) => items.length).map(([title, items]) => section(title, items));
  if (found.length) return found;
  return [make("p", {}, NONE)];
}

function stateOf({ images, unsaved }) {
  return many(images, "image") + (unsaved ? `, ${unsaved.toLocaleString("en")} unwritten` : "");
}

function section(title, items) {
  return make("section", {}, make("h3", {}, title), make("ul", {}, ...items));
}

function item(name, about, does, unwritten = false) {
  const face = [make("span", {}, `${unwritten ? "● " : ""}${name}`), about ? make("small", {}, about) : null];
  const press = make("button", { type: "button", title: name, onClick: does }, ...face.filter(Boolean));
  return make("li", { data: { name: name.toLowerCase() } }, press);
}

function narrow(list, text) {
  const wanted = text.trim().toLowerCase();
  for (const each of list.querySelectorAll("li")) each.hidden = !each.dataset.name.includes(wanted);
  for (const each of list.querySelectorAll("section")) each.hidden = !each.querySelector("li:not([hidden])");
}
