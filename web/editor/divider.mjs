/**
 * The line between the pictures and the panels, moved by the mouse or by arrow keys; its place is remembered.
 */

import { make, used } from "./dom.mjs";
import { remember, remembered } from "./memory.mjs";

const [LEAST, USUAL, MOST, STEP] = [280, 380, 900, 20]; // pixels

/** The divider of `column`, which stands to its right. */
export function divided(column) {
  const divider = make("div", {
    className: "loom-divider",
    role: "separator",
    tabindex: "0",
    "aria-orientation": "vertical",
    "aria-label": "Width of the panels",
    "aria-valuemin": LEAST,
    "aria-valuemax": MOST,
  });
  const resize = (wanted) => {
    const room = (document.documentElement.clientWidth * 2) / 3;
    const width = Math.round(Math.max(LEAST, Math.min(MOST, room, wanted)));
    column.style.width = `${width}px`;
    divider.setAttribute("aria-valuenow", width);
    remember("column", width);
  };
  divider.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    divider.setPointerCapture(event.pointerId);
    const [start, from] = [column.offsetWidth, event.clientX];
    const move = ({ clientX }) => resize(start + from - clientX);
    divider.addEventListener("pointermove", move);
    for (const name of ["pointerup", "pointercancel"]) {
      divider.addEventListener(name, () => divider.removeEventListener("pointermove", move), { once: true });
    }
  });
  divider.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: STEP, ArrowRight: -STEP }[event.key];
    if (!by) return;
    resize(column.offsetWidth + by);
    used(event);
  });
  resize(remembered("column", USUAL, LEAST, MOST));
  return divider;
}
