/**
 * The weights of a LoRA on its node: one line, which opens to bars for blocks and a curve over the run.
 *
 * - the text widgets hold what counts; the panel shows what the server reads in them, and writes into them
 * - a text that is not understood is left alone, with the server's words for what is wrong
 * - what bars and curve cannot show stays in the text, and is listed
 */

import { post } from "../editor/api.mjs";
import { addStyle } from "../styles.mjs";
import { makeBars, rangeOf } from "./bars.mjs";
import { makeCurve } from "./curve.mjs";
import { bounded, onKeys, shown, STYLE } from "./dom.mjs";
import { cleared, schedule, solo, withoutWeight, withPreset, withWeight } from "./text.mjs";

const PAUSE = 150; // milliseconds of quiet before the server is asked
const TEXT_ENCODERS = "te";
const HINTS = {
  none: "Which blocks there are is known after a run, or when a file is chosen.",
  file: "The blocks of the file. A run shows all blocks of the model.",
  linked: "The text comes from another node.",
};

/**
 * `fields`: {texts(): {blocks, steps, interpolation, lora, layout}, linked(name), write(name, text), settled(),
 * hasInterpolation, on(): ids of blocks or null}; `frame`: as frame.mjs makes it. Returns {refresh(), later(),
 * listPresets()}.
 */
export function makePanel(fields, frame) {
  addStyle(STYLE);
  const view = { texts: {}, blocks: null, steps: null, number: 0 };
  let before = null; // the text that a solo replaced
  let range = null; // while a bar is dragged

  // -- blocks

  const texts = () => fields.texts();
  const editable = () => Boolean(view.blocks?.rules) && view.texts.blocks === texts().blocks;
  const ids = () => view.blocks.groups.flatMap((group) => group.bars.map((bar) => bar.id));
  const layers = () => ids().filter((id) => id !== TEXT_ENCODERS);

  const writeBlocks = ({ text, rules }, weights) => {
    view.blocks = { ...view.blocks, rules, bars: { ...view.blocks.bars, ...weights } };
    view.texts.blocks = text;
    fields.write("blocks", text);
    draw();
    later();
  };
  const weighed = (bars, weight) =>
    Object.fromEntries(bars.map((bar) => [bar, { others: view.blocks.bars[bar]?.others ?? "", weight }]));

  const bars = makeBars({
    set(target, weight) {
      if (!editable()) return;
      range ??= rangeOf(weightsOf(view.blocks));
      before = null;
      writeBlocks(withWeight(view.texts.blocks, view.blocks.rules, target, weight), weighed(target.bars, weight));
    },
    done() {
      range = null;
      draw();
      fields.settled();
    },
    reset(target) {
      if (!editable()) return;
      writeBlocks(withoutWeight(view.texts.blocks, view.blocks.rules, target), weighed(target.bars, 1));
      fields.settled();
    },
    solo: (target) => alone(target),
    type: () => frame.number.select(),
    select(target) {
      frame.target.textContent = target ? target.name : "blocks";
      if (document.activeElement !== frame.number) frame.number.value = target ? shown(target.weight) : "";
      frame.number.disabled = frame.solo.disabled = !target;
    },
  });

  function alone(target) {
    if (!editable() || !target.selector) return;
    if (before?.after === texts().blocks && before.name === target.name) {
      fields.write("blocks", before.text);
      before = null;
    } else {
      const text = view.texts.blocks;
      const weight = target.weight || 1;
      const written = solo(text, view.blocks.rules, target, weight, layers());
      before = { text, name: target.name, after: written.text };
      writeBlocks(written, { ...weighed(layers(), 0), ...weighed(target.bars, weight) });
    }
    fields.settled();
    refresh();
  }

  const typed = () => {
    const [target, weight] = [bars.target(), Number(frame.number.value.replace(",", "."))];
    if (!target || !editable() || frame.number.value.trim() === "" || !Number.isFinite(weight)) return;
    const kept = bounded(weight);
    writeBlocks(withWeight(view.texts.blocks, view.blocks.rules, target, kept), weighed(target.bars, kept));
    fields.settled();
  };
  frame.number.addEventListener("change", typed);
  onKeys(frame.number, {
    Enter() {
      typed();
      frame.rows.querySelector("[data-chosen]")?.focus();
    },
    Escape() {
      frame.number.value = shown(bars.target()?.weight ?? 1);
      frame.rows.querySelector("[data-chosen]")?.focus();
    },
  });
  frame.solo.addEventListener("click", () => bars.target() && alone(bars.target()));
  frame.reset.addEventListener("click", () => {
    if (!editable()) return;
    writeBlocks(cleared(view.texts.blocks, view.blocks.rules), weighed(ids(), 1));
    fields.settled();
  });
  frame.presets.addEventListener("change", () => {
    const name = frame.presets.value;
    frame.presets.value = "";
    if (!name || !editable()) return;
    fields.write("blocks", withPreset(view.texts.blocks, view.blocks.rules, name).text);
    fields.settled();
    refresh();
  });
  frame.presets.addEventListener("focus", () => listPresets());

  async function listPresets() {
    try {
      const { lora, layout } = texts();
      const { presets, error } = await post("/blocks/presets", { lora, layout });
      if (error) throw new Error(error);
      frame.list(presets);
    } catch (error) {
      tellFault(error.message);
    }
  }

  // -- the run

  let unit = "fraction"; // of points that are still to come
  const how = () => view.steps?.how ?? (fields.hasInterpolation ? texts().interpolation : "hold");
  const unitOf = () => view.steps?.points?.[0]?.unit ?? unit;
  const isMixed = () => new Set(view.steps?.points?.map((point) => point.unit)).size > 1;
  const canDraw = () => view.steps?.points && !isMixed() && view.texts.steps === texts().steps;

  const writeSteps = (points, own = view.steps.how) => {
    const constant = points.length ? null : 1;
    view.steps = { ...view.steps, points, constant, how: own };
    view.texts.steps = schedule(points, own, view.steps.inset);
    fields.write("steps", view.texts.steps);
    later();
  };
  const curve = makeCurve({
    write: (points) => writeSteps(points),
    done: () => {
      fields.settled();
      draw();
    },
    type: () => frame.point.select(),
    select(point) {
      if (document.activeElement !== frame.point) frame.point.value = point?.text ?? "";
      frame.point.disabled = frame.remove.disabled = !point;
    },
  });
  const typedPoint = () => {
    const [point, text] = [curve.chosen(), frame.point.value.trim()];
    if (!point || !text || text === point.text) return;
    writeSteps(curve.points().map((each) => (each === point ? { ...each, text } : each)));
    fields.settled();
    refresh();
  };
  const back = () => frame.curve.querySelector("[data-chosen]")?.focus();
  frame.point.addEventListener("change", typedPoint);
  onKeys(frame.point, {
    Enter() {
      typedPoint();
      back();
    },
    Escape() {
      frame.point.value = curve.chosen()?.text ?? "";
      back();
    },
  });
  frame.add.addEventListener("click", () => canDraw() && curve.add());
  frame.remove.addEventListener("click", () => curve.remove());
  frame.unit.addEventListener("change", () => {
    unit = frame.unit.value;
    draw();
  });
  frame.how.addEventListener("change", () => {
    const chosen = frame.how.value;
    if (fields.hasInterpolation && !view.steps.how) fields.write("interpolation", chosen);
    else writeSteps(view.steps.points, chosen === "hold" && !fields.hasInterpolation ? null : chosen);
    fields.settled();
    draw();
    refresh();
  });

  // -- what the server says

  let waiting = null;
  const later = () => {
    clearTimeout(waiting);
    waiting = setTimeout(refresh, PAUSE);
  };

  async function refresh() {
    clearTimeout(waiting);
    const asked = texts();
    const number = ++view.number;
    try {
      const found = await post("/blocks", asked);
      if (number !== view.number) return;
      const now = texts();
      if (Object.keys(asked).some((name) => now[name] !== asked[name])) return later();
      Object.assign(view, found, { texts: asked });
      draw();
    } catch (error) {
      if (number === view.number) tellFault(`The weights could not be read: ${error.message}`);
    }
  }

  const tellFault = (text) => {
    frame.fault.textContent = text;
    frame.fault.hidden = !text;
    frame.fitted();
  };

  function draw() {
    const { blocks, steps } = view;
    if (!blocks) return;
    const locked = Boolean(blocks.error) || fields.linked("blocks");
    const on = fields.on();
    const known = Boolean(blocks.groups) && !fields.linked("blocks");
    frame.rows.hidden = frame.tools.hidden = !known;
    if (known) {
      const groups = on ? withOn(blocks.groups, new Set(on)) : blocks.groups;
      bars.draw({ groups, bars: blocks.bars, range: range ?? rangeOf(weightsOf(blocks)), locked });
    }
    const hint = fields.linked("blocks") ? HINTS.linked : (HINTS[blocks.source ?? "none"] ?? "");
    frame.hint.textContent = hint;
    frame.hint.hidden = !hint;
    frame.keep(known && blocks.rules ? keptOf(view.texts.blocks, blocks.rules) : []);
    frame.say(blocks.notes ?? []);

    const isOwn = !fields.linked("steps");
    frame.run.hidden = !isOwn;
    frame.mixed.hidden = !isMixed();
    frame.curve.hidden = isMixed() || Boolean(steps.error);
    if (isOwn && canDraw()) curve.draw({ ...steps, how: how(), unit: unitOf() });
    frame.unit.value = unitOf();
    frame.unit.disabled = Boolean(steps.points?.length) || Boolean(steps.error);
    frame.how.value = how();
    frame.how.disabled = frame.add.disabled = Boolean(steps.error) || isMixed();
    tellFault([blocks.error, isOwn && steps.error].filter(Boolean).join("\n"));
    frame.summarise(summary(view, fields), Boolean(blocks.error || steps.error));
  }

  frame.rows.append(bars.element);
  frame.curve.append(curve.element);
  return { refresh, later, listPresets };
}

const weightsOf = (blocks) => Object.values(blocks.bars ?? {}).map((bar) => bar.weight);

const withOn = (groups, on) =>
  groups.map((group) => ({
    ...group,
    bars: group.bars.map((bar) => ({ ...bar, on: bar.id === TEXT_ENCODERS || on.has(bar.id) })),
  }));

/** The parts of the text that no bar shows: [{text, fault}]. */
function keptOf(text, rules) {
  return rules.filter((rule) => rule.kept).map(({ begin, end, fault }) => ({ text: text.slice(begin, end), fault }));
}

/** The line that is always there: "in 1 · mid 0.5 · out 0 – 1 · steps 0.1 → 0.6". */
function summary({ blocks, steps, texts }, fields) {
  if (blocks.error || steps.error) return "not understood";
  const parts = [];
  if (fields.linked("blocks")) parts.push("blocks from another node");
  else if (!blocks.bars) parts.push(texts.blocks.trim() ? "as written in blocks" : "1 everywhere");
  else parts.push(...ofGroups(blocks));
  const points = steps.points ?? [];
  if (points.length) parts.push(`steps ${shown(points[0].weight)} → ${shown(points.at(-1).weight)}`);
  else if (steps.constant !== 1) parts.push(`steps ${shown(steps.constant)}`);
  return parts.join(" · ");
}

function ofGroups({ groups, bars }) {
  const weights = Object.values(bars);
  if (weights.every((bar) => bar.weight === 1 && !bar.others)) return ["1 everywhere"];
  return groups.flatMap((group) => {
    const apart = group.selector ? [group.bars] : group.bars.map((bar) => [bar]);
    return apart.flatMap((inside) => {
      const own = inside.map((bar) => bars[bar.id]).filter(Boolean);
      const name = group.selector ? group.label : inside[0].label;
      const isPlain = own.every((bar) => bar.weight === 1 && !bar.others);
      if (!own.length || (!group.selector && isPlain)) return [];
      const [low, high] = [Math.min, Math.max].map((end) => end(...own.map((bar) => bar.weight)));
      const range = low === high ? shown(low) : `${shown(low)} – ${shown(high)}`;
      return [`${name} ${range}${own.some((bar) => bar.others) ? " *" : ""}`];
    });
  });
}
