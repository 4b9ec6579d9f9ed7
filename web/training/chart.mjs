/**
 * The chart as an element of the page, with mouse and keyboard.
 *
 * - a crosshair tells the values at a step; dragging over a range looks closer, a double click shows all again
 * - keys: arrows move the crosshair (with Shift by ten), Home and End go to its ends, + and − look closer and further,
 *   0 or Escape show all
 * - sharp at any pixel ratio and any zoom of the graph; drawn once a frame at most, and only while it is seen; the
 *   curves are drawn anew where they have changed, not where the mouse has moved
 */

import { draw, drawAbove, layout, linesOf, readings } from "./drawing.mjs";
import { el } from "./dom.mjs";
import { count, indexOf, short } from "./figures.mjs";
import { view } from "./view.mjs";

const NAMES = ["loss", "validation", "rate", "band0", "band1", "band2", "band3", "grid", "text", "shade"];
const LEAST_DRAG = 5; // pixels
const LARGEST_RATIO = 4; // canvas pixels to one of the page

/** {element, show(curves, label), dispose()} */
export function makeChart() {
  const canvas = el("canvas", {
    className: "loom-run-chart-canvas",
    tabIndex: 0,
    role: "application",
    aria: { roledescription: "chart", keyshortcuts: "ArrowLeft ArrowRight Home End + - 0" },
    title: "Drag to look closer, double-click to see all. Keys: ← → + − 0",
  });
  const tip = el("div", { className: "loom-run-chart-tip", role: "status", hidden: true });
  const empty = el("div", { className: "loom-run-chart-empty", text: "the first points come with the first steps" });
  const element = el("div", { className: "loom-run-chart" }, canvas, tip, empty);
  const state = { curves: {}, lines: [], place: null, range: null, cursor: null, drag: null, frame: 0 };
  const curvesAlone = el("canvas"); // never shown
  let isStale = true;

  const soon = () => (state.frame ||= requestAnimationFrame(paint));
  const redraw = () => {
    isStale = true;
    soon();
  };
  const relined = () => {
    state.lines = linesOf(state.curves, view.values);
    redraw();
  };

  function paint() {
    state.frame = 0;
    const [width, height] = [element.clientWidth, element.clientHeight];
    if (!element.isConnected || width < 40 || height < 40) return;
    const zoom = element.getBoundingClientRect().width / width || 1;
    const ratio = Math.min(LARGEST_RATIO, (window.devicePixelRatio || 1) * Math.max(1, zoom));
    const size = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) {
      for (const each of [canvas, curvesAlone]) Object.assign(each, { width: size[0], height: size[1] });
      isStale = true;
    }
    const colours = coloursOf(element);
    if (isStale) {
      isStale = false;
      state.place = layout(state.lines, { width, height, range: state.range, log: view.values.log });
      empty.hidden = state.lines.some(({ kind }) => kind !== "strip");
      draw(scaled(curvesAlone, ratio), state.lines, state.place, colours);
    }
    const context = scaled(canvas, ratio);
    context.clearRect(0, 0, width, height);
    context.drawImage(curvesAlone, 0, 0, width, height);
    drawAbove(context, state.lines, state.place, colours, state);
    showTip();
  }

  function showTip() {
    tip.hidden = state.cursor === null || !state.lines.length;
    if (tip.hidden) return;
    const rows = readings(state.lines, state.cursor).filter(({ value }) => Number.isFinite(value));
    tip.replaceChildren(
      el("b", { text: `step ${count(state.cursor)}` }),
      ...rows.map(({ label, colour, kind, step, value }) => {
        const at = kind === "points" && step !== state.cursor ? ` (${count(step)})` : "";
        return el("span", { data: { colour, kind } }, el("i"), `${label}${at} ${short(value, 4)}`);
      }),
    );
    const x = state.place.x(state.cursor);
    const isLeft = x > state.place.width / 2;
    Object.assign(tip.style, {
      left: isLeft ? "" : `${x + 10}px`,
      right: isLeft ? `${state.place.width - x + 10}px` : "",
    });
  }

  /** The measured step nearest to that of a mouse event. */
  const stepAt = (event) => {
    const { left, width } = canvas.getBoundingClientRect();
    return clamp(state.place.step(((event.clientX - left) / width) * state.place.width));
  };
  const clamp = (step) => Math.round(Math.min(state.place.to, Math.max(state.place.from, step)));
  const look = (range) => {
    state.range = range;
    redraw();
  };
  const point = (step) => {
    state.cursor = step;
    soon();
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !state.place) return;
    canvas.setPointerCapture(event.pointerId);
    state.drag = [stepAt(event), stepAt(event)];
    state.dragFrom = event.clientX;
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!state.place) return;
    if (state.drag) state.drag = [state.drag[0], stepAt(event)];
    point(stepAt(event));
  });
  canvas.addEventListener("pointerup", (event) => {
    const drag = state.drag;
    state.drag = null;
    soon();
    if (!drag || Math.abs(event.clientX - state.dragFrom) < LEAST_DRAG || drag[0] === drag[1]) return;
    look([Math.min(...drag), Math.max(...drag)]);
  });
  canvas.addEventListener("pointercancel", () => {
    state.drag = null;
    soon();
  });
  canvas.addEventListener("pointerleave", () => state.drag || point(null));
  canvas.addEventListener("blur", () => point(null));
  canvas.addEventListener("dblclick", () => look(null));

  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !state.lines.length || !state.place) return;
    const { from, to } = state.place;
    const steps = (state.lines.find(({ name }) => name === "loss") ?? state.lines[0]).steps;
    const move = (by) => {
      const here = state.cursor === null ? indexOf(steps, by > 0 ? from : to) - by : indexOf(steps, state.cursor);
      point(clamp(steps[Math.min(steps.length - 1, Math.max(0, here + by))]));
    };
    const zoom = (factor) => {
      const [middle, half] = [state.cursor ?? (from + to) / 2, ((to - from) * factor) / 2];
      const [first, last] = [steps[0], steps.at(-1)];
      const range = [Math.max(first, Math.round(middle - half)), Math.min(last, Math.round(middle + half))];
      if (range[0] === first && range[1] === last) look(null);
      else if (range[1] > range[0]) look(range);
    };
    const by = event.shiftKey ? 10 : 1;
    const keys = {
      ArrowLeft: () => move(-by),
      ArrowRight: () => move(by),
      Home: () => point(clamp(from)),
      End: () => point(clamp(to)),
      "+": () => zoom(0.5),
      "=": () => zoom(0.5),
      "-": () => zoom(2),
      0: () => look(null),
      Escape: () => {
        look(null);
        point(null);
      },
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  });

  const sizes = new ResizeObserver(redraw);
  sizes.observe(element);
  const themes = new MutationObserver(redraw);
  for (const each of [document.documentElement, document.body]) {
    themes.observe(each, { attributes: true, attributeFilter: ["class", "style"] });
  }
  view.addEventListener("change", relined);
  return {
    element,
    show(curves, label) {
      if (curves !== state.curves) Object.assign(state, { range: null, cursor: null });
      state.curves = curves;
      canvas.setAttribute("aria-label", label);
      relined();
    },
    dispose() {
      sizes.disconnect();
      themes.disconnect();
      view.removeEventListener("change", relined);
      cancelAnimationFrame(state.frame);
    },
  };
}

/** The canvas to paint on, in pixels of the page. */
function scaled(canvas, ratio) {
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

/** The theme's colours, as panel.css names them. */
function coloursOf(element) {
  const style = getComputedStyle(element);
  const named = NAMES.map((name) => [name, style.getPropertyValue(`--loom-${name}`).trim()]);
  return { ...Object.fromEntries(named), font: style.fontFamily };
}
