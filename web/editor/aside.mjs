/**
 * Keeps the host's own keys, pastes and drops away while a window of ours is open.
 *
 * - what happens inside the window does not get out of it, but for what the mouse does
 * - older hosts listen for undo before any window hears of a key; they ask this switch, newer ones look for dialogs
 */

import { app } from "../../../scripts/app.js";

const KEPT = ["keydown", "keyup", "keypress", "copy", "cut", "paste", "dragenter", "dragover", "drop", "contextmenu"];
const SWITCH = "maskeditor_is_opended"; // as the host spells it

export function keepInside(element) {
  for (const name of KEPT) element.addEventListener(name, (event) => event.stopPropagation());
  for (const name of ["dragover", "drop"]) {
    element.addEventListener(name, (event) => {
      if (event.dataTransfer?.types.includes("Files")) event.preventDefault(); // the browser would open the file
    });
  }
}

/** Keep the host from undoing its graph; returns what ends that. */
export function holdHost() {
  const host = app.constructor;
  const before = host[SWITCH];
  host[SWITCH] = () => true;
  return () => (host[SWITCH] = before);
}
