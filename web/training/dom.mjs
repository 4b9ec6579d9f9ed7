/**
 * Elements of the page, made in one call: el("button", { text: "Save", onclick: save }).
 *
 * - text goes in as text, never as markup; functions are listeners; `data` and `aria` are spread
 */

export const STYLE = new URL("./panel.css", import.meta.url).href;

export function el(tag, { text, data = {}, aria = {}, ...rest } = {}, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(data)) element.dataset[name] = value;
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  for (const [name, value] of Object.entries(rest)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter(Boolean));
  return element;
}

/** Set what is told only where it differs: a page that redraws four times a second must not wake screen readers. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
