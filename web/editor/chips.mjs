/**
 * Tags as chips: one list, reached by one Tab, walked by arrow keys.
 *
 * - Delete or × removes, Enter, F2 or a double click edits in place with completion, Alt and an arrow key or the mouse
 *   moves; a weight stands in a corner of its own
 * - hollow chips are tags that some of several images have, with how many: Enter or a click puts them on all
 * - after an edit the focus is where it was
 */

import { weightOf } from "./caption_text.mjs";
import { addCompletion } from "./completion.mjs";
import { button, make, moved, used } from "./dom.mjs";

const DRAG_FROM = 5; // pixels; less is a click
const UP_DOWN = ["ArrowUp", "ArrowDown"];
const HELP = "Delete removes, Enter edits, Alt and arrow keys move";

/**
 * @param {object} options
 * @param {string} options.label spoken name of the list
 * @param {(text: string) => Promise<object | null>} options.complete for editing in place
 * @param {(index: number) => void} options.remove
 * @param {(index: number, text: string) => void} [options.edit]
 * @param {(from: number, to: number) => void} [options.move] where they have an order
 * @param {(index: number) => void} [options.pick] what Enter and a click do where tags cannot be edited
 * @returns {{element: HTMLElement, show: (chips: {tag: string, note?: string, hollow?: boolean}[]) => void}}
 */
export function chipList({ label, complete, remove, edit, move, pick }) {
  const element = make("ul", {
    className: "loom-chips",
    role: "listbox",
    "aria-label": label,
    "aria-orientation": "horizontal",
  });
  let [chips, here] = [[], 0];
  const isEditing = () => element.querySelector("input") !== null;

  const focus = (index) => {
    here = Math.max(0, Math.min(index, chips.length - 1));
    for (const [at, chip] of [...element.children].entries()) chip.tabIndex = at === here ? 0 : -1;
    element.children[here]?.focus({ preventScroll: false });
  };

  const show = (now) => {
    const kept = element.contains(document.activeElement);
    chips = now;
    here = Math.max(0, Math.min(here, chips.length - 1));
    element.replaceChildren(...chips.map(chipOf));
    element.hidden = !chips.length;
    if (kept && chips.length) focus(here);
  };

  const chipOf = ({ tag, note, hollow }, index) => {
    const { text, weight } = weightOf(tag);
    const spoken = [text, weight && `weight ${weight}`, note].filter(Boolean).join(", ");
    return make(
      "li",
      {
        className: "loom-chip",
        role: "option",
        tabindex: index === here ? 0 : -1,
        "aria-label": spoken,
        "aria-selected": "false",
        title: pick ? spoken : `${spoken}\n${HELP}`,
        data: { tag, ...(hollow ? { hollow: "yes" } : {}) },
        onKeyDown: (event) => onKey(event, index),
        onFocus: () => (here = index),
        onDblClick: () => edit && begin(index),
        onClick: () => pick?.(index),
        onPointerDown: (event) => move && drag(event, index),
      },
      make("span", { className: "loom-chip-text" }, text),
      weight && make("span", { className: "loom-chip-note" }, weight),
      note && make("span", { className: "loom-chip-note" }, note),
      button("×", (event) => (event.stopPropagation(), remove(index)), {
        label: `Remove ${text}`,
        className: "loom-chip-remove",
        tabindex: -1,
      }),
    );
  };

  const onKey = (event, index) => {
    if (event.target !== element.children[index]) return; // typing in it
    const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
    if (event.altKey && step && move) {
      const to = index + step;
      if (to >= 0 && to < chips.length) {
        here = to;
        move(index, to);
      }
      return used(event);
    }
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const count = chips.length;
    const target = moved(event.key, index, count) ?? moved(event.key, index, count, UP_DOWN);
    if (target !== null) focus(target);
    else if (event.key === "Delete" || event.key === "Backspace") remove(index);
    else if (edit && (event.key === "F2" || event.key === "Enter")) begin(index);
    else if (pick && (event.key === "Enter" || event.key === " ")) pick(index);
    else return;
    used(event);
  };

  /** Edit a chip in place. */
  const begin = (index) => {
    if (isEditing()) return;
    const chip = element.children[index];
    const { tag } = chips[index];
    const named = { className: "loom-chip-field", "aria-label": `Edit ${tag}` };
    const input = make("input", { type: "text", ...named, value: tag });
    let over = false;
    const end = (text) => {
      if (over) return;
      over = true;
      const hadFocus = chip.contains(document.activeElement);
      chip.replaceWith(chipOf(chips[index], index));
      if (hadFocus) focus(index);
      if (text === "") remove(index);
      else if (text !== tag) edit(index, text);
    };
    addCompletion(input, { complete });
    input.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Enter") end(input.value.trim());
      else if (event.key === "Escape") end(tag);
      else return;
      event.preventDefault();
    });
    input.addEventListener("blur", () => end(input.value.trim()));
    chip.replaceChildren(input);
    input.focus();
    input.select();
  };

  /** Follow the mouse until it lets go, with a mark where the chip would come to stand. */
  const drag = (down, from) => {
    if (down.button !== 0 || down.target.closest("button, input")) return;
    const chip = element.children[from];
    let to = from;
    let under = false;
    const follow = (event) => {
      under ||= Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) >= DRAG_FROM;
      if (!under) return;
      if (!chip.hasPointerCapture(down.pointerId)) chip.setPointerCapture(down.pointerId);
      chip.dataset.dragged = "yes";
      to = placeAt(event.clientX, event.clientY, from);
      mark(from, to);
    };
    const stop = (event) => {
      listeners.forEach(([name, listener]) => chip.removeEventListener(name, listener));
      delete chip.dataset.dragged;
      mark(from, from);
      if (event.type === "pointerup" && to !== from) {
        here = to;
        move(from, to);
      }
    };
    const listeners = [["pointermove", follow], ["pointerup", stop], ["pointercancel", stop]];
    listeners.forEach(([name, listener]) => chip.addEventListener(name, listener));
  };

  /** Which index a chip gets that is let go at a point. */
  const placeAt = (x, y, from) => {
    const boxes = [...element.children].map((chip) => chip.getBoundingClientRect());
    const before = boxes.filter((box) => box.bottom < y || (box.top <= y && (box.left + box.right) / 2 < x)).length;
    return Math.max(0, Math.min(chips.length - 1, before > from ? before - 1 : before));
  };

  const mark = (from, to) => {
    for (const [index, chip] of [...element.children].entries()) {
      const side = index === to && to !== from ? (to > from ? "behind" : "before") : undefined;
      if (side) chip.dataset.drop = side;
      else delete chip.dataset.drop;
    }
  };

  return { element, show, isEditing };
}
