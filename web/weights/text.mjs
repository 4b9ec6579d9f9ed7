/**
 * Weights written back into the texts of a node: pure functions, text in and text out.
 *
 * - the server has read the text and says which part of it means what (`rules`); nothing here knows the language, save
 *   how one value is written
 * - a value is replaced where it stands; where none stands, a rule is put in front of those that no picture shows, so
 *   that these go on acting
 * - what is kept as text is never touched
 */

import { shown } from "./dom.mjs";

const RULE = "rule";
const PRESET = "preset";

/**
 * `bars` (ids) get `weight`; `selector` is what means them in a text. Returns {text, rules}, to go on from.
 * A vector keeps its form where it has an entry for each of them.
 */
export function withWeight(text, rules, { bars, selector }, weight) {
  const wanted = new Set(bars);
  const cut = apart(text, rules);
  const isWider = ({ rule }) => isShown(rule) && overlaps(rule, wanted) && !inside(rule, wanted);
  const outside = cut.parts.findLastIndex(isWider);
  const exact = cut.parts.findLastIndex(
    ({ rule }, at) => at > outside && isShown(rule) && inside(rule, wanted) && rule.bars.length === wanted.size,
  );
  const value = shown(weight);
  const entries = cut.parts.filter(({ rule }) => rule.kind === "entry" && !rule.kept && inside(rule, wanted));
  const isWhole = new Set(entries.flatMap(({ rule }) => rule.bars)).size === wanted.size;
  const place = cut.parts[exact] ?? null;
  cut.parts = without(cut.parts, (part) => part !== place && isShown(part.rule) && inside(part.rule, wanted));
  if (place) {
    place.body = place.body.slice(0, place.rule.value - place.rule.begin) + value;
  } else if (isWhole && outside < 0) {
    for (const entry of entries) entry.body = value;
  } else {
    insert(cut, { kind: RULE, bars: [...wanted], kept: false }, `${selector}=`, value, wanted);
  }
  return together(cut);
}

/** `bars` have what the rest of the text says, 1 where it says nothing of them. */
export function withoutWeight(text, rules, target) {
  const wanted = new Set(target.bars);
  const cut = apart(text, rules);
  cut.parts = without(cut.parts, ({ rule }) => isShown(rule) && inside(rule, wanted));
  const others = cut.parts.some(({ rule }) => rule.kind === PRESET || (!rule.kept && overlaps(rule, wanted)));
  return others ? withWeight(text, rules, target, 1) : together(cut);
}

/** Only what no picture shows. */
export function cleared(text, rules) {
  const cut = apart(text, rules);
  cut.parts = without(cut.parts, ({ rule }) => rule.kind !== RULE || !rule.kept);
  if (!cut.parts.length) cut.tail = "";
  return together(cut);
}

/** The preset `name`, then what no picture shows. */
export function withPreset(text, rules, name) {
  const rest = cleared(text, rules);
  const cut = apart(rest.text, rest.rules);
  insert(cut, { kind: PRESET, bars: [], kept: false }, "", name, new Set());
  return together(cut);
}

/** `target` alone acts, with `weight`; `all` are the bars of the whole model. */
export function solo(text, rules, target, weight, all) {
  const rest = withWeight(text, rules, { bars: all, selector: "all" }, 0);
  return withWeight(rest.text, rest.rules, target, weight);
}

/** A schedule of `points` [{text}] in the order of the run. */
export function schedule(points, how, inset) {
  if (!points.length) return "";
  const ending = points.length > 1 && how ? ` ${how}` : "";
  return points.map((point) => point.text).join(", ") + ending + (inset ? ` of steps-${inset}` : "");
}

/** One point; `percent` says how a part of the run is written. */
export function pointText({ weight, position, unit }, percent = true) {
  return `${shown(weight)}@${place(position, unit, percent)}`;
}

function place(position, unit, percent) {
  const number = Number(position.toFixed(4));
  if (unit === "sigma") return `s${number}`;
  if (unit === "step") return Number.isInteger(number) ? String(number + 1) : `after${number}`;
  if (percent) return `${Number((position * 100).toFixed(2))}%`;
  return Number.isInteger(number) ? `${number}.0` : String(number);
}

// -- the text as parts, each with what stands before it

const isShown = (rule) => rule.kind === RULE && !rule.kept;
const overlaps = (rule, wanted) => rule.bars.some((bar) => wanted.has(bar));
const inside = (rule, wanted) => rule.bars.length > 0 && rule.bars.every((bar) => wanted.has(bar));

function apart(text, rules) {
  let at = 0;
  const parts = rules.map((rule) => {
    const part = { before: text.slice(at, rule.begin), body: text.slice(rule.begin, rule.end), rule };
    at = rule.end;
    return part;
  });
  return { parts, tail: text.slice(at) };
}

function together({ parts, tail }) {
  let text = "";
  const rules = parts.map(({ before, body, rule }) => {
    const begin = text.length + before.length;
    text += before + body;
    return { ...rule, begin, end: text.length, value: begin + rule.value - rule.begin };
  });
  return { text: text + tail, rules };
}

function without(parts, isLeft) {
  const kept = parts.filter((part) => !isLeft(part));
  if (kept.length && kept[0] !== parts[0]) kept[0].before = parts[0].before;
  return kept;
}

/** Behind the last rule that names more than `wanted`, else behind the vector or preset, else in front of all. */
function insert(cut, rule, name, value, wanted) {
  const { parts } = cut;
  const behind = parts.findLastIndex((part) =>
    part.rule.kind === RULE ? isShown(part.rule) && overlaps(part.rule, wanted) : true,
  );
  const between = parts.some((part) => part.rule.kind === RULE && /^\s*,[^\n]*$/.test(part.before)) ? ", " : "\n";
  const first = behind < 0;
  const part = {
    before: first ? (parts[0]?.before ?? "") : between,
    body: name + value,
    rule: { ...rule, begin: 0, value: name.length },
  };
  if (first && parts.length) parts[0].before = between;
  parts.splice(behind + 1, 0, part);
  if (parts.length === 1) cut.tail = ""; // of a text that was blank
}
