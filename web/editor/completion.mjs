/**
 * Completion of tags in a field.
 *
 * - any part of a tag or of one of its aliases finds it: the dataset's own first, then those of the user's lists, with
 *   their counts; a list's category is told by colour and when pointed at; an alias shows the tag it stands for
 * - arrow keys choose, Enter takes what is chosen, Tab that or the first, Escape closes; without a choice Enter takes
 *   what was typed, so that nothing is ever put in its place unasked
 * - what is shown stays until something newer is there, and answers that come late are dropped: nothing flickers
 * - in a field for several tags the one under the cursor is completed
 */

import { later, make, used } from "./dom.mjs";
import { nameOf } from "./quoting.mjs";

const QUIET = 90; // milliseconds after a key before the server is asked
const MOST = 20;
const GAP = 2;
// as danbooru and e621 number them; what they number differently has a colour only
const CATEGORIES = { 0: "general", 1: "artist", 3: "copyright", 4: "character" };

let fields = 0;

/**
 * Completes in `input` from `complete(text)`: {text, dataset: [[tag, count]], lists: [{tag, count, category, alias}]}.
 *
 * @param {HTMLInputElement} input
 * @param {object} options
 * @param {(text: string) => Promise<object | null>} options.complete
 * @param {() => string} [options.separator] what divides the tags of a field for several
 * @param {(tag: string) => string} [options.written] how a chosen tag stands in the field
 * @param {(tag: string) => void} [options.take] what to do with a chosen tag instead of writing it into the field
 */
export function addCompletion(input, { complete, separator, written = (tag) => tag, take }) {
  const id = `loom-completion-${++fields}`;
  const list = make("ul", { id, role: "listbox", className: "loom-completion", "aria-label": "Tags", hidden: true });
  let [found, active, asked] = [[], -1, 0];
  for (const [name, value] of Object.entries({
    role: "combobox",
    autocomplete: "off",
    spellcheck: "false",
    "aria-autocomplete": "list",
    "aria-expanded": "false",
    "aria-controls": id,
  })) {
    input.setAttribute(name, value);
  }

  const piece = () => {
    const mark = separator?.();
    const at = input.selectionStart ?? input.value.length;
    if (!mark) return { start: 0, end: input.value.length, text: input.value.trim() };
    const start = at ? input.value.lastIndexOf(mark, at - 1) : -1;
    const stop = input.value.indexOf(mark, at);
    const [from, to] = [start < 0 ? 0 : start + mark.length, stop < 0 ? input.value.length : stop];
    return { start: from, end: to, text: input.value.slice(from, to).trim() };
  };

  const close = () => {
    ask.cancel();
    asked++;
    [found, active] = [[], -1];
    list.hidden = true;
    list.remove();
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };

  const ask = later(async () => {
    const { text } = piece();
    const number = ++asked;
    if (!text) return close();
    let answer = null;
    try {
      answer = await complete(text);
    } catch {
      return close(); // the field works without; whoever asked the server has said what is wrong
    }
    if (number !== asked || answer?.text !== text || document.activeElement !== input) return;
    found = merged(answer, nameOf(text));
    if (!found.length) return close();
    show();
  }, QUIET);

  const show = () => {
    list.replaceChildren(...found.map((each, index) => option(each, `${id}-${index}`, () => choose(index))));
    if (!list.isConnected) (input.closest("dialog, [role=dialog]") ?? document.body).append(list);
    list.hidden = false;
    place(list, input);
    input.setAttribute("aria-expanded", "true");
    light(-1);
  };

  const light = (index) => {
    list.children[active]?.setAttribute("aria-selected", "false");
    active = index;
    const lit = list.children[active];
    lit?.setAttribute("aria-selected", "true");
    lit?.scrollIntoView({ block: "nearest" });
    if (lit) input.setAttribute("aria-activedescendant", lit.id);
    else input.removeAttribute("aria-activedescendant");
  };

  const choose = (index) => {
    const { tag } = found[index];
    const { start, end } = piece();
    close();
    if (take) return take(tag);
    const mark = separator?.();
    const text = `${start ? " " : ""}${written(tag)}`;
    const [before, behind] = [input.value.slice(0, start), input.value.slice(end)];
    const ending = mark && !behind ? `${mark} ` : "";
    input.value = before + text + ending + behind;
    const caret = (before + text + ending).length;
    input.setSelectionRange(caret, caret);
    input.dispatchEvent(new CustomEvent("input", { bubbles: true, detail: "chosen" }));
  };

  input.addEventListener("input", (event) => event.detail === "chosen" || ask());
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (event.isComposing || !found.length) return;
    const count = found.length;
    if (event.key === "ArrowDown") light(active + 1 < count ? active + 1 : -1);
    else if (event.key === "ArrowUp") light(active >= 0 ? active - 1 : count - 1);
    else if (event.key === "Escape") close();
    else if (event.key === "Tab" && !event.shiftKey) choose(Math.max(active, 0));
    else if (event.key === "Enter" && active >= 0 && !event.ctrlKey && !event.metaKey) choose(active);
    else return;
    used(event);
    event.stopImmediatePropagation();
  });
  return { close };
}

/** Tags of the dataset, then those of the lists that are not among them; what begins with the text comes first. */
function merged({ dataset = [], lists = [] }, text) {
  const own = dataset.map(([tag, count]) => ({ tag, count, own: true }));
  const known = new Set(own.map(({ tag }) => plain(tag)));
  const others = lists.filter(({ tag }) => !known.has(plain(tag)));
  const begins = ({ tag }) => plain(tag).startsWith(plain(text));
  const sorted = (tags) => [...tags.filter(begins), ...tags.filter((each) => !begins(each))];
  return [...sorted(own), ...sorted(others)].slice(0, MOST);
}

const plain = (tag) => nameOf(tag).replaceAll("_", " ");

function option({ tag, count, own, category, alias }, id, choose) {
  const kind = CATEGORIES[category];
  return make(
    "li",
    {
      id,
      role: "option",
      "aria-selected": "false",
      title: kind ? `${tag}: ${kind}` : tag,
      data: { from: own ? "dataset" : "list", ...(Number.isInteger(category) ? { category } : {}) },
      onMouseDown: (event) => event.preventDefault(), // the field keeps the focus
      onClick: choose,
    },
    make("span", { className: "loom-completion-tag" }, alias ? `${alias} → ${tag}` : tag),
    make("span", { className: "loom-count" }, own ? `${count} here` : short(count)),
  );
}

function short(count) {
  if (count >= 1e6) return `${(count / 1e6).toFixed(1)}M`;
  return count >= 1e4 ? `${Math.round(count / 1e3)}k` : String(count);
}

/** Beneath the field, or above it where there is more room; wherever its parents begin to count from. */
function place(list, input) {
  const field = input.getBoundingClientRect();
  const below = window.innerHeight - field.bottom;
  const above = below < 160 && field.top > below;
  const room = (above ? field.top : below) - 3 * GAP;
  Object.assign(list.style, { left: 0, top: 0, maxHeight: `${Math.min(300, room)}px`, minWidth: `${field.width}px` });
  const at = list.getBoundingClientRect();
  const left = Math.max(0, Math.min(field.left, window.innerWidth - at.width - GAP));
  const top = above ? field.top - at.height - GAP : field.bottom + GAP;
  Object.assign(list.style, { left: `${left - at.left}px`, top: `${top - at.top}px` });
}
