/**
 * A chart of curves on a canvas, drawn by hand.
 *
 * - the loss as measured, faint, and smoothed; what was measured in validation, as points; the loss of each band of
 *   timesteps, smoothed; the learning rate in a strip of its own below
 * - `layout` says which step and value lies where, `draw` paints it, `drawAbove` the crosshair and what is dragged over
 * - single peaks of the raw loss do not flatten the rest: the axis holds 98 of 100 of its points
 */

import { bandsOf, ratesOf } from "./curves.mjs";
import { count, decimated, logTicks, nearest, short, smoothed, spread, ticks } from "./figures.mjs";

const LEFT = 46;
const RIGHT = 12;
const TOP = 10;
const BOTTOM = 20;
const STRIP = 30; // pixels of the learning rate
const BETWEEN = 8;
const INNER = 0.98; // of the raw points lie within the axis
const ROOM = 0.06; // above and below the curves
const LEAST_POINTS = 50; // fewer are shown to the last

/** The curves to draw: [{name, label, colour, steps, values, kind}], kind being faint, line, points or strip. */
export function linesOf(curves, { smoothing, loss, validation, bands, rate }) {
  const lines = [];
  const add = (name, label, colour, kind, weight = 0) => {
    const curve = curves[name];
    if (!curve?.step.length) return;
    lines.push({ name, label, colour, kind, steps: curve.step, values: smoothed(curve.value, weight) });
  };
  if (loss) {
    if (smoothing > 0) add("loss", "loss", "loss", "faint");
    add("loss", smoothing > 0 ? "smoothed" : "loss", "loss", "line", smoothing);
  }
  if (bands) {
    bandsOf(curves).forEach((name, index) => {
      add(name, name.replace("loss at ", "t "), `band${index % 4}`, "line", smoothing);
    });
  }
  if (validation) add("validation", "validation", "validation", "points");
  if (rate) for (const name of ratesOf(curves)) add(name, name.replace("_", " "), "rate", "strip");
  return lines;
}

/** Where everything lies, on a canvas of this size; `range` are the steps that are looked at, null for all. */
export function layout(lines, { width, height, range, log }) {
  const strip = lines.some(({ kind }) => kind === "strip") && height > 130;
  const plot = { left: LEFT, right: width - RIGHT, top: TOP, bottom: height - BOTTOM - (strip ? STRIP + BETWEEN : 0) };
  const all = lines.filter(({ steps }) => steps.length);
  const first = Math.min(...all.map(({ steps }) => steps[0]));
  const last = Math.max(...all.map(({ steps }) => steps.at(-1)));
  const [from, to] = range ?? (all.length ? [first, Math.max(last, first + 1)] : [0, 1]);
  const [low, high] = heights(lines, from, to, log);
  const scale = log ? Math.log10 : (value) => value;
  const [bottom, top] = [scale(low), scale(high)];
  return {
    ...{ plot, from, to, low, high, log, width, height },
    strip: strip ? { ...plot, top: height - BOTTOM - STRIP, bottom: height - BOTTOM } : null,
    x: (step) => plot.left + ((step - from) / (to - from)) * (plot.right - plot.left),
    y: (value) => plot.bottom - ((scale(value) - bottom) / (top - bottom)) * (plot.bottom - plot.top),
    step: (x) => from + ((x - plot.left) / (plot.right - plot.left)) * (to - from),
  };
}

function heights(lines, from, to, log) {
  let [low, high] = [Infinity, -Infinity];
  for (const { steps, values, kind } of lines) {
    if (kind === "strip") continue;
    const seen = values.filter((value, index) => steps[index] >= from && steps[index] <= to && (!log || value > 0));
    const [least, most] = spread(seen, kind === "faint" && seen.length >= LEAST_POINTS ? INNER : 1);
    [low, high] = [Math.min(low, least), Math.max(high, most)];
  }
  if (!(high >= low)) return log ? [0.1, 1] : [0, 1];
  if (log) return high > low ? [low / (high / low) ** ROOM, high * (high / low) ** ROOM] : [low / 2, high * 2];
  const room = (high - low || Math.abs(high) || 1) * ROOM;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

/** The nearest points to a step: [{label, colour, step, value}]. */
export function readings(lines, step) {
  return lines.map(({ label, colour, kind, steps, values }) => {
    const index = nearest(steps, step);
    return { label: kind === "faint" ? "loss" : label, colour, kind, step: steps[index], value: values[index] };
  });
}

/** Paint `lines` as `place` (of `layout`) says; `colours` by name. */
export function draw(context, lines, place, colours) {
  context.clearRect(0, 0, place.width, place.height);
  context.font = `11px ${colours.font}`;
  axes(context, place, colours);
  for (const kind of ["faint", "line", "points"]) {
    const drawn = lines.filter((each) => each.kind === kind);
    within(context, place.plot, () => drawn.forEach((each) => paint(context, each, place, colours)));
  }
  if (place.strip) strip(context, lines.filter(({ kind }) => kind === "strip"), place, colours);
}

/** Paint what follows the mouse above it; `cursor` is a step or null, `drag` two or null. */
export function drawAbove(context, lines, place, colours, { cursor, drag }) {
  if (drag) {
    const [one, other] = drag.map(place.x);
    context.fillStyle = colours.shade;
    context.fillRect(Math.min(one, other), place.plot.top, Math.abs(other - one), place.plot.bottom - place.plot.top);
  }
  if (cursor !== null) crosshair(context, lines, place, colours, cursor);
}

function axes(context, place, colours) {
  const { plot, low, high, from, to, log } = place;
  context.lineWidth = 1;
  context.strokeStyle = colours.grid;
  context.fillStyle = colours.text;
  context.textAlign = "right";
  context.textBaseline = "middle";
  const room = Math.max(3, Math.floor((plot.bottom - plot.top) / 28));
  const values = log ? logTicks(low, high) : ticks(low, high, room);
  const digits = Math.ceil(Math.log10(Math.abs(high) / (values[1] - values[0]))) + 1; // that tell neighbours apart
  for (const value of values) {
    const y = Math.round(place.y(value)) + 0.5;
    context.globalAlpha = 0.5;
    line(context, plot.left, y, plot.right, y);
    context.globalAlpha = 1;
    context.fillText(short(value, log ? 3 : Math.min(6, Math.max(2, digits || 0))), plot.left - 6, y);
  }
  context.textAlign = "center";
  context.textBaseline = "alphabetic";
  for (const step of ticks(from, to, Math.max(2, Math.floor((plot.right - plot.left) / 80)), true)) {
    const x = Math.min(Math.max(place.x(step), plot.left + 8), plot.right - 8);
    context.fillText(count(step), x, place.height - 5);
  }
}

function strip(context, lines, place, colours) {
  const { left, right, top, bottom } = place.strip;
  const most = Math.max(...lines.flatMap(({ values }) => spread(values)[1]));
  context.strokeStyle = colours.grid;
  context.globalAlpha = 0.5;
  context.strokeRect(left + 0.5, top + 0.5, right - left - 1, bottom - top - 1);
  context.globalAlpha = 1;
  context.fillStyle = colours.text;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillText(short(most, 2), left - 6, top + 6);
  context.fillText("lr", left - 6, bottom - 7);
  const y = (value) => bottom - 3 - (most > 0 ? value / most : 0) * (bottom - top - 6);
  for (const each of lines) within(context, place.strip, () => paint(context, each, { ...place, y }, colours));
}

function paint(context, { kind, colour, steps, values }, place, colours) {
  const columns = Math.max(1, place.plot.right - place.plot.left);
  const kept = decimated(steps, values, place.from, place.to, columns);
  const isShown = (value) => Number.isFinite(value) && (!place.log || kind === "strip" || value > 0);
  context.strokeStyle = context.fillStyle = colours[colour];
  context.globalAlpha = kind === "faint" ? 0.45 : 1;
  context.lineWidth = kind === "line" ? 1.75 : kind === "points" ? 1.25 : 1;
  context.lineJoin = kept.length < columns ? "round" : "bevel"; // round ones take long, and are seen where there is room
  context.beginPath();
  let begun = false;
  for (const index of kept) {
    if (!isShown(values[index])) {
      begun = kind === "line" && begun; // a gap in what is raw
      continue;
    }
    if (begun) context.lineTo(place.x(steps[index]), place.y(values[index]));
    else context.moveTo(place.x(steps[index]), place.y(values[index]));
    begun = true;
  }
  context.stroke();
  const dots = kind === "points" || kept.length === 1 ? kept : [];
  for (const index of dots) if (isShown(values[index])) dot(context, place.x(steps[index]), place.y(values[index]), 3);
  context.globalAlpha = 1;
}

function crosshair(context, lines, place, colours, cursor) {
  const x = Math.round(place.x(cursor)) + 0.5;
  context.strokeStyle = colours.text;
  context.lineWidth = 1;
  context.setLineDash([3, 3]);
  line(context, x, place.plot.top, x, (place.strip ?? place.plot).bottom);
  context.setLineDash([]);
  for (const { kind, colour, step, value } of readings(lines, cursor)) {
    if (kind === "strip" || kind === "faint" || !Number.isFinite(value) || (place.log && value <= 0)) continue;
    context.fillStyle = colours[colour];
    within(context, place.plot, () => dot(context, place.x(step), place.y(value), 3.5));
  }
}

function within(context, { left, right, top, bottom }, paintIt) {
  context.save();
  context.beginPath();
  context.rect(left, top - 4, right - left + 4, bottom - top + 8);
  context.clip();
  paintIt();
  context.restore();
}

function line(context, ...[fromX, fromY, toX, toY]) {
  context.beginPath();
  context.moveTo(fromX, fromY);
  context.lineTo(toX, toY);
  context.stroke();
}

function dot(context, x, y, radius) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}
