/**
 * The panel of what is chosen: the caption of one image, or the tags of several.
 *
 * - its tags as chips, and a field that adds tags, with completion
 * - the caption as plain text; Ctrl+Enter or leaving the field applies it, Escape takes back what was typed
 * - the caption as training shows it, and beside what is in the file, with the words marked that differ
 * - of several images: tags that all have, and those that some have, with how many; a click puts these on all
 */

import { reordered, withTag, without } from "./caption_text.mjs";
import { chipList } from "./chips.mjs";
import { addCompletion } from "./completion.mjs";
import { diffView } from "./diff.mjs";
import { button, make, many, used } from "./dom.mjs";
import { failed, separator } from "./images.mjs";
import { exactly, listed, nameOf, quoted, splitTags } from "./quoting.mjs";

const MOST_CHIPS = 300; // of tags that some of the selected images have

export function captionPanel(store) {
  const complete = (text) => store.complete(text);
  const head = make("h3", { className: "loom-head" });
  const one = oneImage(store, complete);
  const several = severalImages(store, complete);
  const field = addField(store, complete, (tags, place) => {
    if (isSeveral() || chosen()) (isSeveral() ? several : one).add(tags, place);
  });
  const hint = make("p", { className: "loom-faint" }, "Choose an image to edit its caption, or several at once.");
  const element = make("div", { className: "loom-panel-body" }, head, hint, one.chips, several.chips, field, one.rest);
  const isSeveral = () => store.selection.size > 1;
  const chosen = () => [...store.selection][0] ?? store.cursor;

  const update = async () => {
    const id = isSeveral() ? null : chosen();
    if (!id) one.leave();
    hint.hidden = isSeveral() || id !== null;
    for (const each of field.children) each.disabled = !hint.hidden;
    [one.chips.hidden, one.rest.hidden, several.chips.hidden] = [!id, !id, !isSeveral()];
    if (isSeveral()) head.textContent = `${many(store.selection.size, "image")} selected`;
    else if (!id) head.textContent = "";
    await (isSeveral() ? several.show() : id ? one.show(id, head) : null);
  };
  return { id: "caption", title: "Caption", element, update, start: () => field.firstChild.focus() };
}

/** The field that adds tags: Enter at the end, Shift and Enter in front. */
function addField(store, complete, add) {
  const input = make("input", {
    type: "text",
    className: "loom-field",
    placeholder: "Add tags…",
    "aria-label": "Add tags",
    title: "Enter adds at the end, Shift+Enter in front",
    data: { loom: "add" },
  });
  const take = (text, place) => {
    input.value = "";
    const tags = splitTags(text, separator(store));
    if (tags.length) add(tags, place);
  };
  addCompletion(input, { complete, take: (tag) => take(tag, "") });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.isComposing) return;
    take(input.value, event.shiftKey ? " at start" : "");
    used(event);
  });
  return make("div", { className: "loom-row" }, input, button("Add", () => take(input.value, "")));
}

function oneImage(store, complete) {
  let [detail, asked, sent] = [null, 0, null];
  let chain = Promise.resolve();
  const list = chipList({
    label: "Tags of this image",
    complete,
    remove: (index) => act((now) => remove(now, index)),
    edit: (index, text) => act((now) => rename(now, index, text)),
    move: (from, to) => act((now) => reorder(now, from, to)),
  });
  const text = make("textarea", {
    className: "loom-text",
    rows: 4,
    spellcheck: "false",
    "aria-label": "Caption as text",
    title: "Ctrl+Enter applies, Escape takes back",
  });
  const shown = make("div", { className: "loom-shown" });
  const changed = make("div");
  const apply = button("Apply", () => applyText(), { className: "small", disabled: true });
  const rest = make(
    "div",
    { className: "loom-stack" },
    make("div", { className: "loom-caption-head" }, make("h4", {}, "As text"), apply),
    text,
    make("h4", {}, "As training shows it"),
    shown,
    changed,
  );

  /** One edit after the other, each on the caption as it is by then: keys may come faster than answers. */
  const act = (edit) => {
    chain = chain.then(async () => {
      if (!detail) return;
      await edit(detail);
      if (detail) await show(detail.id);
    });
    chain = chain.catch((error) => failed(store, error)); // the next one has its turn nonetheless
    return chain;
  };

  /** The line where it says what is meant, else the whole caption. */
  const onTag = async (now, index, line, whole) => {
    const tag = now.tags[index];
    const isPlain = now.tags.filter((other) => nameOf(other) === nameOf(tag)).length === 1 && !/^[([]/.test(tag);
    if (isPlain) {
      const done = await store.edit(line, [now.id]);
      if (!done || done.changed.length) return;
    }
    await store.edit(`set caption ${quoted(whole)}`, [now.id]);
  };

  const remove = (now, index) => {
    const whole = without(now.caption, now.tags, index);
    return onTag(now, index, `remove ${quoted(exactly(now.tags[index]))}`, whole);
  };

  const rename = (now, index, written) => {
    const line = `rename ${quoted(exactly(now.tags[index]))} to ${listed(splitTags(written, separator(store)))}`;
    return onTag(now, index, line, withTag(now.caption, now.tags, index, written));
  };

  const reorder = (now, from, to) => {
    const whole = reordered(now.caption, now.tags, from, to);
    if (now.caption.includes("\n")) return store.edit(`set caption ${quoted(whole)}`, [now.id]);
    return onTag(now, from, `move ${quoted(exactly(now.tags[from]))} to position ${to + 1}`, whole);
  };

  const isTyped = () => detail !== null && text.value !== detail.caption.replace(/\r\n?/g, "\n");
  const applyText = () => {
    if (!isTyped() || text.value === sent) return chain;
    const [id, written] = [detail.id, (sent = text.value)];
    chain = chain.then(() => store.edit(`set caption ${quoted(written)}`, [id]));
    return chain;
  };
  text.addEventListener("input", () => (apply.disabled = !isTyped()));
  text.addEventListener("change", applyText); // also where the focus goes elsewhere: nothing typed is lost
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) applyText();
    else if (event.key === "Escape" && isTyped()) text.value = detail.caption;
    else return;
    apply.disabled = !isTyped();
    used(event);
  });

  const show = async (id, head) => {
    if (detail && detail.id !== id) leave();
    const number = ++asked;
    const now = await store.detail(id);
    if (number !== asked) return;
    const keep = detail?.id === id && isTyped() && document.activeElement === text;
    [detail, sent] = [now, null];
    if (head) head.textContent = now.name;
    if (head) head.title = now.name;
    if (!list.isEditing()) list.show(now.tags.map((tag) => ({ tag })));
    if (!keep) text.value = now.caption;
    apply.disabled = !isTyped();
    shown.replaceChildren(now.shown || make("span", { className: "loom-faint" }, "nothing: the caption is empty"));
    const heads = [store.state.keeps === "files" ? "In its file" : "Before the program", "Now"];
    const isSame = now.before === now.caption;
    changed.replaceChildren(...(isSame ? [] : [make("h4", {}, "Changed"), diffView(now.before, now.caption, heads)]));
  };

  /** Another image: what was typed belongs to this one. */
  const leave = () => {
    applyText();
    asked++;
    detail = null;
  };
  return {
    chips: list.element,
    rest,
    show,
    leave,
    add: (tags, place) => act((now) => store.edit(`add ${listed(tags)}${place}`, [now.id])),
  };
}

function severalImages(store, complete) {
  let [asked, tags] = [0, { common: [], partial: [] }];
  const images = () => [...store.selection];
  const does = (line) => store.edit(line, images());
  const remove = (tag) => does(`remove ${quoted(exactly(tag))}`);
  const common = chipList({
    label: "Tags of all selected images",
    complete,
    remove: (index) => remove(tags.common[index]),
    edit: (index, text) =>
      does(`rename ${quoted(exactly(tags.common[index]))} to ${listed(splitTags(text, separator(store)))}`),
  });
  const partial = chipList({
    label: "Tags of some selected images",
    complete,
    remove: (index) => remove(tags.partial[index][0]),
    pick: (index) => does(`add ${quoted(tags.partial[index][0])}`),
  });
  const [none, more] = [make("p", { className: "loom-faint" }), make("p", { className: "loom-faint" })];
  const chips = make(
    "div",
    { className: "loom-stack", hidden: true },
    make("h4", {}, "On all of them"),
    common.element,
    none,
    make("h4", {}, "On some: a click puts a tag on all"),
    partial.element,
    more,
  );

  const show = async () => {
    const number = ++asked;
    const found = await store.selected();
    if (number !== asked || common.isEditing()) return;
    tags = { common: found.common, partial: found.partial.slice(0, MOST_CHIPS) };
    common.show(tags.common.map((tag) => ({ tag })));
    partial.show(tags.partial.map(([tag, count]) => ({ tag, note: `${count} of ${found.images}`, hollow: true })));
    none.textContent = tags.common.length ? "" : "No tag is on all of them.";
    const left = found.partial.length - tags.partial.length;
    more.textContent = left ? `and ${many(left, "tag")} more: see Tags` : tags.partial.length ? "" : "None.";
  };
  return { chips, show, add: (added, place) => does(`add ${listed(added)}${place}`) };
}
