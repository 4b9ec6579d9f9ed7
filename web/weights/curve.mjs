/**
 * Weights over a run as a curve: points on a line, held until the next one or blended into it.
 *
 * - a click adds a point, a drag moves it, Delete removes it; the arrow keys move the point that has the focus
 * - one clock at a time: parts of the run, steps, or noise levels; a text that mixes them is left to itself
 */

import { bounded, make, moved, onKeys, shown, STEP } from "./dom.mjs";
import { rangeOf } from "./bars.mjs";
import { pointText } from "./text.mjs";

export const UNITS = { fraction: "% of run", step: "steps", sigma: "noise" };
const SAMPLES = 24; // between two points that are blended
const FIRST_STEPS = 20; // shown before a point lies further on
const FIRST_NOISE = 15;
const SVG = "http://www.w3.org/2000/svg";

/**
 * Adds the curve: {element, draw(drawn), chosen(), add(), remove()}.
 * `act`: {write(points), done(), type(), select(point)}; `drawn`: {points, constant, how, unit}, as the server told.
 */
export function makeCurve(act) {
  const line = document.createElementNS(SVG, "polyline");
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.append(line);
  const plot = make("div", "loom-weights-plot", { role: "group", "aria-label": "Weight over the run" }, svg);
  plot.title = "Click to add a point; drag it; Delete removes it";
  const [first, last] = [make("span", ""), make("span", "")];
  const element = make("div", "loom-weights-curve", {}, plot, make("div", "loom-weights-axis", {}, first, last));
  let now = { points: [], constant: 1, how: "hold", unit: "fraction", percent: true };
  let chosen = -1;
  let held = null; // the scale, while a point is dragged

  const scale = () => held ?? scaleOf(now);

  const select = (at) => {
    chosen = at;
    for (const [number, handle] of handles().entries()) handle.toggleAttribute("data-chosen", number === at);
    act.select(now.points[at] ?? null);
  };
  const handles = () => [...plot.querySelectorAll(".loom-weights-point")];

  /** Put a point where another was, or add one; the curve is drawn and the text written. */
  const put = (at, point) => {
    const fresh = { ...point, unit: now.unit };
    fresh.text = pointText(fresh, now.percent);
    const points = now.points.filter((_, number) => number !== at);
    points.push(fresh);
    points.sort((one, other) => timeOf(one) - timeOf(other));
    now = { ...now, points };
    act.write(points);
    chosen = points.indexOf(fresh);
    show();
    return chosen;
  };

  const add = (position, weight) => {
    const { end } = scaleOf(now);
    const begin = { position: now.unit === "sigma" ? end : 0, weight: now.constant ?? 1 };
    if (!now.points.length && position !== begin.position) put(-1, begin);
    put(-1, { position, weight });
    focus();
    act.done();
  };
  const focus = () => handles()[chosen]?.focus({ preventScroll: true });

  const remove = () => {
    if (!now.points[chosen]) return;
    now = { ...now, points: now.points.filter((_, number) => number !== chosen) };
    act.write(now.points);
    chosen = Math.min(chosen, now.points.length - 1);
    show();
    if (chosen < 0) plot.focus();
    else focus();
    act.done();
  };

  /** Add a point where there is most room: without a mouse. */
  const addAnywhere = () => {
    const { end, fromPart, toPart } = scaleOf(now);
    const places = [0, ...now.points.map((point) => toPart(point.position)), 1];
    const gaps = places.slice(1).map((place, number) => place - places[number]);
    const widest = gaps.indexOf(Math.max(...gaps));
    const position = rounded(fromPart((places[widest] + places[widest + 1]) / 2), now.unit, end);
    add(position, now.points[Math.max(widest - 1, 0)]?.weight ?? now.constant ?? 1);
  };

  const show = () => {
    const { low, high, toPart, labels } = scale();
    const y = (weight) => (100 * (high - Math.min(Math.max(weight, low), high))) / (high - low);
    line.setAttribute("points", outline(now, toPart).map(([x, weight]) => `${100 * x},${y(weight)}`).join(" "));
    plot.style.setProperty("--loom-zero", `${100 - y(0)}%`);
    plot.style.setProperty("--loom-one", `${100 - y(1)}%`);
    const there = handles();
    for (const spare of there.splice(now.points.length)) spare.remove();
    for (const [at, point] of now.points.entries()) {
      const handle = there[at] ?? makeHandle(at);
      handle.style.left = `${100 * Math.min(Math.max(toPart(point.position), 0), 1)}%`;
      handle.style.top = `${y(point.weight)}%`;
      handle.title = point.text;
      handle.setAttribute("aria-valuenow", shown(point.weight));
      handle.setAttribute("aria-valuetext", point.text);
      handle.setAttribute("aria-label", `Point ${at + 1} of ${now.points.length}`);
      handle.toggleAttribute("data-chosen", at === chosen);
    }
    [first.textContent, last.textContent] = labels;
    act.select(now.points[chosen] ?? null);
  };

  const makeHandle = (at) => {
    const attributes = { role: "slider", tabindex: "0", "aria-valuemin": "-100", "aria-valuemax": "100" };
    const handle = make("div", "loom-weights-point", attributes);
    const change = (weight, position) => {
      const point = now.points[at];
      const to = put(at, { weight: weight ?? point.weight, position: position ?? point.position });
      handles()[to]?.focus({ preventScroll: true });
      act.done();
    };
    const by = (way) => (event) => {
      change(moved(now.points[at].weight, event.shiftKey ? way / 5 : way, event.shiftKey));
    };
    const along = (way) => (event) => change(null, nudged(now, at, event.shiftKey ? way / 5 : way));
    onKeys(handle, {
      ArrowUp: by(STEP),
      ArrowDown: by(-STEP),
      ArrowLeft: along(-1),
      ArrowRight: along(1),
      Home: () => change(0),
      End: () => change(1),
      Delete: remove,
      Backspace: remove,
      Enter: act.type,
    });
    handle.addEventListener("focus", () => select(at));
    handle.addEventListener("dblclick", (event) => {
      event.stopPropagation();
      act.type();
    });
    plot.append(handle);
    return handle;
  };

  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || plot.hasAttribute("data-locked")) return;
    event.stopPropagation();
    event.preventDefault();
    const at = handles().indexOf(event.target);
    if (at < 0) {
      const { position, weight } = placeOf(event);
      return add(position, weight);
    }
    select(at);
    event.target.focus({ preventScroll: true });
    held = scaleOf(now);
    let dragged = null;
    const move = (next) => {
      next.stopPropagation();
      if (!dragged && Math.hypot(next.clientX - event.clientX, next.clientY - event.clientY) < 3) return;
      dragged = placeOf(next);
      put(chosen, dragged);
    };
    const stop = (next) => {
      next.stopPropagation();
      plot.removeEventListener("pointermove", move);
      for (const end of ["pointerup", "pointercancel"]) plot.removeEventListener(end, stop);
      held = null;
      if (!dragged) return;
      show();
      focus();
      act.done();
    };
    plot.setPointerCapture(event.pointerId);
    plot.addEventListener("pointermove", move);
    for (const end of ["pointerup", "pointercancel"]) plot.addEventListener(end, stop);
  });

  const placeOf = ({ clientX, clientY }) => {
    const { left, top, width, height } = plot.getBoundingClientRect();
    const { low, high, fromPart, end } = scale();
    const part = Math.min(Math.max((clientX - left) / width, 0), 1);
    const weight = high - ((high - low) * (clientY - top)) / height;
    const position = rounded(fromPart(part), now.unit, end);
    return { position, weight: moved(bounded(Math.min(Math.max(weight, low), high)), 0) };
  };

  const draw = (drawn) => {
    const percent = !drawn.points.length || drawn.points.some((point) => point.text.includes("%"));
    const points = [...drawn.points].sort((one, other) => timeOf(one) - timeOf(other));
    now = { ...drawn, points, percent };
    plot.toggleAttribute("data-locked", Boolean(drawn.locked));
    if (chosen >= points.length) chosen = -1;
    show();
  };
  const pick = () => now.points[chosen] ?? null;
  return { element, draw, remove, add: addAnywhere, chosen: pick, points: () => now.points };
}

const timeOf = ({ unit, position }) => (unit === "sigma" ? -position : position);

/** The axes that hold all points. */
function scaleOf({ points, unit, constant }) {
  const range = rangeOf(points.length ? points.map((point) => point.weight) : [constant ?? 1]);
  const furthest = Math.max(0, ...points.map((point) => point.position));
  if (unit === "step") {
    const end = Math.max(FIRST_STEPS - 1, Math.ceil(furthest * 1.2));
    const labels = ["step 1", `step ${end + 1}`];
    return { ...range, end, toPart: (at) => at / end, fromPart: (part) => part * end, labels };
  }
  if (unit === "sigma") {
    const end = furthest > 1 || !points.length ? Math.max(FIRST_NOISE, Math.ceil(furthest)) : 1;
    const toPart = (at) => 1 - Math.sqrt(at / end); // most of a run is spent at low noise
    return { ...range, end, toPart, fromPart: (part) => end * (1 - part) ** 2, labels: [`noise ${end}`, "noise 0"] };
  }
  return { ...range, end: 1, toPart: (at) => at, fromPart: (part) => part, labels: ["start of the run", "end"] };
}

function rounded(position, unit, end) {
  const kept = Math.min(Math.max(position, 0), end);
  if (unit === "step") return Math.round(kept);
  return Number(kept.toFixed(2));
}

/** The position one key press further on. */
function nudged({ points, unit }, at, way) {
  const { position } = points[at];
  if (unit === "step") return Math.max(0, Math.round(position) + Math.sign(way));
  if (unit === "sigma") return Math.max(0, Number((position - way * Math.max(0.01, position * 0.05)).toFixed(3)));
  return Math.min(Math.max(Number((position + way * 0.05).toFixed(2)), 0), 1);
}

/** The line as [part of the width, weight]. */
function outline({ points, constant, how }, toPart) {
  if (!points.length) return [0, 1].map((x) => [x, constant ?? 1]);
  const line = [[0, points[0].weight]];
  for (const [number, point] of points.entries()) {
    const [x, before] = [toPart(point.position), points[number - 1]];
    if (before && how !== "hold") {
      const from = toPart(before.position);
      for (let sample = 1; sample < SAMPLES; sample++) {
        const part = sample / SAMPLES;
        const eased = how === "cosine" ? (1 - Math.cos(Math.PI * part)) / 2 : part;
        line.push([from + (x - from) * part, before.weight + (point.weight - before.weight) * eased]);
      }
    } else if (before) {
      line.push([x, before.weight]);
    }
    line.push([x, point.weight]);
  }
  line.push([1, points.at(-1).weight]);
  return line;
}
