/**
 * Block weights as bars: a row for each group of blocks, a bar for each block.
 *
 * - the name of a row is a slider as well: it gives all blocks of the group one weight
 * - one tab stop a row; left and right go from bar to bar, up and down change a weight, Home is 0, End is 1
 * - weights below 0 hang from the line of 0; the range grows with what there is
 * - hatched: layers of the block have other weights too; pale: the LoRA is not on it
 */

import { make, onKeys, shown, slider, weightKeys } from "./dom.mjs";

const HEIGHT = 52; // pixels of a row, as the stylesheet has it
const LABELLED = 13; // bars of a row that have room for their numbers

/**
 * Adds rows to an element: {element, draw(view), target()}.
 * `act`: {set(target, weight), done(), reset(target), solo(target), type(), select(target)}; a target is
 * {bars: ids, selector, name, weight}.
 */
export function makeBars(act) {
  const element = make("div", "loom-weights-rows", { role: "group", "aria-label": "Weights of blocks" });
  let rows = [];
  let chosen = null;
  let shape = "";

  const select = (target) => {
    chosen = target;
    for (const row of rows) row.mark(target);
    act.select(target);
  };

  const draw = ({ groups, bars, range, locked }) => {
    const now = JSON.stringify(groups);
    if (now !== shape) {
      shape = now;
      rows = groups.map((group) => makeRow(group, { ...act, select }));
      element.replaceChildren(...rows.map((row) => row.element));
      chosen = null;
    }
    element.toggleAttribute("data-locked", locked);
    for (const row of rows) row.draw(bars, range, locked);
    if (chosen) select(chosen);
  };

  return { element, draw, target: () => chosen };
}

function makeRow(group, act) {
  const name = make("span", "loom-weights-name", { text: group.label });
  const value = make("span", "loom-weights-value");
  const head = make("div", "loom-weights-head", { "data-group": group.label }, name, value);
  const strip = make("div", "loom-weights-strip");
  const element = make("div", "loom-weights-row", {}, head, strip);
  let range = { low: 0, high: 1 };
  const perUnit = () => HEIGHT / (range.high - range.low);

  const whole = {
    bars: group.bars.map((bar) => bar.id),
    selector: group.selector,
    name: group.label,
    weight: 1,
  };
  const bars = group.bars.map((bar) => makeBar(bar, group, perUnit, act));
  strip.append(...bars.map((bar) => bar.element));
  for (const [at, bar] of bars.entries()) {
    const go = (to) => () => bars[to]?.focus();
    onKeys(bar.element, { ArrowLeft: go(at - 1), ArrowRight: go(at + 1) });
    bar.element.addEventListener("focus", () => {
      for (const other of bars) other.element.tabIndex = other === bar ? 0 : -1;
    });
  }
  bars[0].element.tabIndex = 0;
  if (group.selector) {
    lead(head, whole, perUnit, act);
    head.setAttribute("aria-label", `All of ${group.label}`);
    head.title = `All of ${group.label}: drag up or down, double-click to type`;
    head.tabIndex = 0;
  }

  const draw = (weights, now, locked) => {
    range = now;
    for (const bar of bars) bar.draw(weights?.[bar.target.bars[0]], range, locked);
    const [low, high] = extremes(bars.map((bar) => bar.target.weight));
    whole.weight = (low + high) / 2;
    value.textContent = low === high ? shown(low) : `${shown(low)} – ${shown(high)}`;
    if (!group.selector) value.textContent = "";
    head.setAttribute("aria-valuenow", shown(whole.weight));
    head.setAttribute("aria-valuetext", value.textContent);
    head.setAttribute("aria-disabled", String(Boolean(locked)));
    const [zero, one] = [0, 1].map((weight) => `${(100 * (weight - range.low)) / (range.high - range.low)}%`);
    strip.style.setProperty("--loom-zero", zero);
    strip.style.setProperty("--loom-one", one);
  };
  const mark = (target) => {
    head.toggleAttribute("data-chosen", target === whole);
    for (const bar of bars) bar.element.toggleAttribute("data-chosen", target === bar.target);
  };
  return { element, draw, mark };
}

function makeBar({ id, selector, label, on }, group, perUnit, act) {
  const fill = make("div", "loom-weights-fill");
  const element = make("div", "loom-weights-bar", { "aria-label": selector, "data-bar": id, tabindex: "-1" }, fill);
  if (group.bars.length <= LABELLED) element.append(make("span", "loom-weights-number", { text: label }));
  element.toggleAttribute("data-off", !on);
  const target = { bars: [id], selector, name: selector, weight: 1 };
  lead(element, target, perUnit, act);

  const draw = (bar, { low, high }, locked) => {
    target.weight = bar?.weight ?? 1;
    const [from, to] = extremes([0, target.weight]);
    const part = (weight) => (100 * (Math.min(Math.max(weight, low), high) - low)) / (high - low);
    fill.style.bottom = `${part(from)}%`;
    fill.style.height = `${part(to) - part(from)}%`;
    fill.toggleAttribute("data-negative", target.weight < 0);
    element.toggleAttribute("data-mixed", Boolean(bar?.others));
    const others = bar?.others ? `; its layers have ${bar.others}` : "";
    element.title = `${selector}: ${shown(target.weight)}${others}${on ? "" : "; this LoRA is not on it"}`;
    element.setAttribute("aria-valuenow", shown(target.weight));
    element.setAttribute("aria-valuetext", shown(target.weight) + others);
    element.setAttribute("aria-disabled", String(Boolean(locked)));
  };
  return { element, draw, target, focus: () => element.focus() };
}

/** Make an element the slider of a target. */
function lead(element, target, perUnit, act) {
  element.setAttribute("role", "slider");
  element.setAttribute("aria-orientation", "vertical");
  element.setAttribute("aria-valuemin", "-100");
  element.setAttribute("aria-valuemax", "100");
  const isLocked = () => element.getAttribute("aria-disabled") === "true";
  const set = (weight) => isLocked() || act.set(target, weight);
  const done = () => isLocked() || act.done();
  const value = () => target.weight;
  slider(element, { value, perUnit, set, done, select: () => act.select(target) });
  onKeys(element, {
    ...weightKeys({ value, set, done }),
    Delete: () => isLocked() || act.reset(target),
    Backspace: () => isLocked() || act.reset(target),
    Enter: () => isLocked() || act.type(),
    s: () => isLocked() || act.solo(target),
  });
  element.addEventListener("focus", () => act.select(target));
  element.addEventListener("dblclick", (event) => {
    event.preventDefault();
    event.stopPropagation();
    if (!isLocked()) act.type();
  });
}

const extremes = (numbers) => [Math.min(...numbers), Math.max(...numbers)];

/** What a picture of these weights has to reach, with room to drag beyond 0 and 1. */
export function rangeOf(weights) {
  const [low, high] = extremes([-0.25, 1.25, ...weights]);
  return {
    low: low < -0.25 ? Math.floor(2 * low - 0.5) / 2 : low,
    high: high > 1.25 ? Math.ceil(2 * high + 0.5) / 2 : high,
  };
}
