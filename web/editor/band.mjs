/**
 * A rectangle drawn with the mouse over the grid: what it touches is selected when it is let go.
 *
 * - a press that hardly moves is a click
 * - near the upper and lower edge the grid scrolls on
 * - Escape leaves everything as it was
 */

import { make } from "./dom.mjs";

const SLACK = 5; // pixels
const EDGE = 30;
const SPEED = 14; // pixels per frame

/** `space` is what scrolls inside `element`; `click(event)`, `touched(box)` → indices, `select(indices, event)`. */
export function drawBand(element, space, { click, touched, select }) {
  const band = make("div", { className: "loom-band" });
  let drawn = null; // {from, to, event, frame, started}

  const point = ({ clientX, clientY }) => {
    const { left, top } = space.getBoundingClientRect();
    return [clientX - left, clientY - top];
  };
  const box = () => {
    const [[x0, y0], [x1, y1]] = [drawn.from, drawn.to];
    return { left: Math.min(x0, x1), top: Math.min(y0, y1), right: Math.max(x0, x1), bottom: Math.max(y0, y1) };
  };
  const show = () => {
    const { left, top, right, bottom } = box();
    const room = space.getBoundingClientRect();
    Object.assign(band.style, {
      left: `${Math.max(0, left)}px`,
      top: `${Math.max(0, top)}px`,
      width: `${Math.min(room.width, right) - Math.max(0, left)}px`,
      height: `${Math.max(0, Math.min(room.height, bottom) - Math.max(0, top))}px`,
    });
    const indices = new Set(touched(box()).map(String));
    for (const tile of space.querySelectorAll(".loom-tile")) {
      tile.classList.toggle("banded", indices.has(tile.dataset.index));
    }
  };
  const end = () => {
    cancelAnimationFrame(drawn.frame);
    band.remove();
    for (const tile of space.querySelectorAll(".banded")) tile.classList.remove("banded");
    drawn = null;
  };
  const scroll = () => {
    const { top, bottom } = element.getBoundingClientRect();
    const y = drawn.event.clientY;
    const by = y < top + EDGE ? -SPEED : y > bottom - EDGE ? SPEED : 0;
    if (by) {
      element.scrollTop += by;
      drawn.to = point(drawn.event);
      show();
    }
    drawn.frame = requestAnimationFrame(scroll);
  };

  element.addEventListener("pointerdown", (event) => {
    const { left } = element.getBoundingClientRect();
    if (event.button || event.clientX > left + element.clientWidth) return; // the scroll bar
    if (event.pointerType === "touch") return; // scrolls; a tap is a click
    drawn = { from: point(event), to: point(event), event, frame: 0, started: false };
  });
  element.addEventListener("pointermove", (event) => {
    if (drawn && !event.buttons) drawn = null; // let go outside
    if (!drawn) return;
    [drawn.to, drawn.event] = [point(event), event];
    if (!drawn.started) {
      if (Math.hypot(drawn.to[0] - drawn.from[0], drawn.to[1] - drawn.from[1]) < SLACK) return;
      drawn.started = true;
      element.setPointerCapture(event.pointerId); // not before, or what is clicked would be the grid
      space.append(band);
      drawn.frame = requestAnimationFrame(scroll);
    }
    show();
  });
  element.addEventListener("pointerup", (event) => {
    if (!drawn?.started) return void (drawn = null);
    const indices = touched(box());
    end();
    element.dataset.banded = "1"; // the click that follows is part of it
    setTimeout(() => delete element.dataset.banded);
    select(indices, event);
  });
  element.addEventListener("pointercancel", () => drawn && end());
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !drawn?.started) return;
    event.preventDefault();
    event.stopPropagation();
    end();
  });
  element.addEventListener("click", (event) => {
    if (!element.dataset.banded) click(event);
  });
}
