/**
 * The panel of all tags of the dataset, with the number of images that have each.
 *
 * - narrowed while typing, sorted by number or by name; only the rows in sight are in the page, also of 50,000 tags
 * - a click or Enter filters the pictures by the tag, and once more takes that back; arrow keys walk the table
 * - F2 renames everywhere, Delete removes everywhere, with a preview first; Shift+Enter adds to the selected images
 */

import { addCompletion } from "./completion.mjs";
import { button, make, many, moved, used } from "./dom.mjs";
import { separator } from "./images.mjs";
import { proposal } from "./proposal.mjs";
import { exactly, listed, quoted, splitTags, tagFilter } from "./quoting.mjs";

const ROW = 26; // pixels
const AROUND = 8; // rows above and below those in sight
const SORTS = { count: "Images", name: "Tag" };

export function tagPanel(store) {
  let [all, rows, here, sort] = [[], [], -1, "count"];
  const search = make("input", {
    type: "search",
    className: "loom-field",
    placeholder: "Find tags…",
    "aria-label": "Find tags",
  });
  const told = make("span", { className: "loom-faint", role: "status" });
  const sorting = (by) => button(SORTS[by], () => sortBy(by), { className: "quiet", title: `Sort by ${by}` });
  const heads = { name: sorting("name"), count: sorting("count") };
  const space = make("div", { className: "loom-table-space" });
  const table = { className: "loom-table", role: "listbox", tabindex: 0, "aria-label": "Tags of the dataset" };
  const list = make("div", table, space);

  const actions = {
    filter: button("Filter", () => filter(), { title: "Show the images with this tag (Enter)" }),
    rename: button("Rename…", () => rename(), { title: "Rename it on all images (F2)" }),
    remove: button("Remove…", () => remove(), { title: "Remove it from all images (Delete)" }),
    add: button("Add to selected", () => add(), { title: "Add it to the selected images (Shift+Enter)" }),
  };
  const chosen = make("div", { className: "loom-chosen" });
  const buttons = make("div", { className: "loom-row loom-wrap" }, ...Object.values(actions));
  const field = make("input", { type: "text", className: "loom-field", "aria-label": "New name" });
  addCompletion(field, { complete: (text) => store.complete(text) });
  const naming = make("div", { className: "loom-row", hidden: true }, make("span", {}, "to"), field);
  const plan = proposal(store, { applied: () => end(), cancel: () => end() });
  const element = make(
    "div",
    { className: "loom-panel-body loom-fill" },
    make("div", { className: "loom-row" }, search, told),
    make("div", { className: "loom-table-head" }, heads.name, heads.count),
    list,
    chosen,
    buttons,
    naming,
    plan.element,
  );

  const tag = () => rows[here]?.[0];

  const sortBy = (by) => {
    sort = by;
    narrow();
  };

  const narrow = () => {
    const [kept, part] = [tag(), search.value.trim().toLowerCase()];
    rows = part ? all.filter(([name]) => name.toLowerCase().includes(part)) : [...all];
    if (sort === "name") rows.sort(([one], [other]) => (one.toLowerCase() < other.toLowerCase() ? -1 : 1));
    for (const [by, head] of Object.entries(heads)) head.setAttribute("aria-pressed", String(by === sort));
    told.textContent = (part ? `${rows.length.toLocaleString("en")} of ` : "") + many(all.length, "tag");
    space.style.height = `${rows.length * ROW}px`;
    here = rows.findIndex(([name]) => name === kept);
    draw();
  };

  /** Put the rows in sight into the page. */
  const draw = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - AROUND);
    const last = Math.min(rows.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + AROUND);
    space.replaceChildren(...rows.slice(first, last).map((row, index) => rowOf(row, first + index)));
    const lit = here >= first && here < last ? `loom-tag-${here}` : null;
    if (lit) list.setAttribute("aria-activedescendant", lit);
    else list.removeAttribute("aria-activedescendant");
    const selected = store.selection.size;
    const none = rows.length ? "Choose a tag." : all.length ? "No tag has this in it." : "No tags yet.";
    chosen.textContent = tag() ?? none;
    for (const each of Object.values(actions)) each.disabled = tag() === undefined;
    actions.add.disabled ||= !selected;
    actions.add.textContent = selected ? `Add to ${selected.toLocaleString("en")} selected` : "Add to selected";
    actions.filter.textContent = tag() !== undefined && store.filter === tagFilter(tag()) ? "Show all" : "Filter";
  };

  const rowOf = ([name, count], index) =>
    make(
      "div",
      {
        className: "loom-table-row",
        id: `loom-tag-${index}`,
        role: "option",
        "aria-selected": String(index === here),
        "aria-label": `${name}, ${many(count, "image")}`,
        "aria-setsize": rows.length,
        "aria-posinset": index + 1,
        title: name,
        style: `top: ${index * ROW}px; height: ${ROW}px`,
        data: store.filter === tagFilter(name) ? { filtered: "yes" } : {},
        onClick: () => {
          go(index);
          filter();
        },
      },
      make("span", { className: "loom-table-tag" }, name),
      make("span", { className: "loom-count" }, count.toLocaleString("en")),
    );

  const go = (index) => {
    if (index !== here) end(false);
    here = index;
    const top = index * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    draw();
  };

  const filter = () => store.setFilter(store.filter === tagFilter(tag()) ? "" : tagFilter(tag()));
  const remove = () => {
    end(false);
    plan.propose(`remove ${quoted(exactly(tag()))}`);
    plan.focus();
  };
  const rename = () => {
    end(false);
    naming.hidden = false;
    field.value = tag();
    field.focus();
    field.select();
  };
  const add = () => store.edit(`add ${quoted(tag())}`, [...store.selection]);
  const end = (back = true) => {
    naming.hidden = true;
    plan.withdraw();
    if (back) list.focus();
  };

  field.addEventListener("input", () => {
    const names = splitTags(field.value, separator(store));
    const isNew = names.length && field.value.trim() !== tag();
    if (isNew) plan.propose(`rename ${quoted(exactly(tag()))} to ${listed(names)}`);
    else plan.withdraw();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") plan.apply();
    else if (event.key === "Escape") end();
    else return;
    used(event);
  });
  search.addEventListener("input", narrow);
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" && rows.length) {
      list.focus();
      go(Math.max(0, here));
    } else if (event.key === "Escape" && search.value) {
      search.value = "";
      narrow();
    } else return;
    used(event);
  });
  list.addEventListener("scroll", draw);
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const step = { PageUp: here - page, PageDown: here + page }[event.key];
    const target = step ?? moved(event.key, here, rows.length, ["ArrowUp", "ArrowDown"]);
    if (target !== null && rows.length) go(Math.max(0, Math.min(rows.length - 1, target)));
    else if (tag() === undefined) return;
    else if (event.key === "Enter" && event.shiftKey) actions.add.disabled || add();
    else if (event.key === "Enter") filter();
    else if (event.key === "F2") rename();
    else if (event.key === "Delete") remove();
    else if (event.key === "Escape" && !plan.element.hidden) end();
    else return;
    used(event);
  });
  new ResizeObserver(draw).observe(list);

  const update = async () => {
    const now = await store.tags();
    if (now !== all) {
      all = now;
      plan.update();
      narrow();
    } else {
      draw();
    }
  };
  return { id: "tags", title: "Tags", element, update };
}
