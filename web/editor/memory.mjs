/**
 * Small numbers that the window remembers in this browser: sizes and what is shown.
 */

const PREFIX = "LoRALoom.editor.";

export function remembered(name, otherwise, least, most) {
  try {
    const number = Number.parseFloat(localStorage.getItem(PREFIX + name));
    return number >= least && number <= most ? number : otherwise;
  } catch {
    return otherwise; // the browser keeps nothing for this page
  }
}

export function remember(name, number) {
  try {
    localStorage.setItem(PREFIX + name, String(number));
  } catch {
    // then it is as usual the next time
  }
}
