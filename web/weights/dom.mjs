/**
 * Elements of the weights' panel, and the moves that its sliders share.
 *
 * - text goes in as text, never as markup
 * - `slider`: dragged up and down, turned by the wheel while it has the focus, led by the keyboard
 */

export const STEP = 0.05;
export const FINE = 0.01;
const MOST = 100; // what the parser takes
const STILL = 3; // pixels that a click may move
export const STYLE = new URL("./weights.css", import.meta.url).href;

export function make(tag, className, { text, ...rest } = {}, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(rest)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A weight as it is written: three decimals at most. */
export const shown = (weight) => String(Number(weight.toFixed(3)) + 0);

export const bounded = (weight) => Math.min(Math.max(weight, -MOST), MOST);

const snapped = (weight, step) => Number((Math.round(weight / step) * step).toFixed(3)) + 0;

/** One step of the keyboard or the wheel. */
export const moved = (weight, by, fine) => bounded(snapped(weight + by, fine ? FINE : STEP));

/**
 * Let `element` change a weight. `value()` is what it has, `perUnit()` how many pixels 1 is long, `set(weight)` changes
 * it, `done()` comes when a drag is over.
 */
export function slider(element, { value, perUnit, set, done, select }) {
  element.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.stopPropagation(); // else the node is dragged
    event.preventDefault();
    element.focus({ preventScroll: true });
    select();
    const [start, unit, from] = [event.clientY, perUnit(), value()];
    let dragged = false;
    const move = (now) => {
      now.stopPropagation();
      const way = start - now.clientY;
      if (!dragged && Math.abs(way) < STILL) return;
      dragged = true;
      set(bounded(snapped(from + way / unit, now.shiftKey ? FINE : STEP)));
    };
    const stop = (now) => {
      now.stopPropagation();
      element.removeEventListener("pointermove", move);
      for (const end of ["pointerup", "pointercancel"]) element.removeEventListener(end, stop);
      if (dragged) done();
    };
    element.setPointerCapture(event.pointerId);
    element.addEventListener("pointermove", move);
    for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, stop);
  });
  element.addEventListener(
    "wheel",
    (event) => {
      if (document.activeElement !== element || event.ctrlKey) return; // the canvas zooms
      event.preventDefault();
      event.stopPropagation();
      set(moved(value(), event.deltaY < 0 ? STEP : -STEP, event.shiftKey));
      done();
    },
    { passive: false },
  );
}

/** Let `keys` (key → what it does) act on an element, and no key of theirs on the graph. */
export function onKeys(element, keys) {
  element.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    act(event);
  });
}

/** The weight's keys, the same for bars, groups and points. */
export function weightKeys({ value, set, done }) {
  const by = (step) => (event) => {
    set(event.shiftKey ? moved(value(), Math.sign(step) * FINE, true) : moved(value(), step));
    done();
  };
  const to = (weight) => () => {
    set(weight);
    done();
  };
  return {
    ArrowUp: by(STEP),
    ArrowDown: by(-STEP),
    PageUp: by(0.25),
    PageDown: by(-0.25),
    Home: to(0),
    End: to(1),
  };
}
