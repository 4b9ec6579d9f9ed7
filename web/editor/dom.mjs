/**
 * Elements of the page in one expression.
 *
 * - `make(tag, {attribute, onEvent, …}, …children)`: texts become text nodes, never markup
 * - `button`: one that does not submit anything, with a spoken name where its face is a sign
 * - `later`: a function that runs once things have been quiet for a while
 * - `moved`: which of several things an arrow key leads to
 */

const AS_PROPERTY = new Set(["value", "checked", "disabled", "hidden", "textContent", "className", "selected", "open"]);

export function make(tag, given = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (value === undefined || value === null) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2).toLowerCase(), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (AS_PROPERTY.has(name)) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function button(face, does, { label, className = "", ...given } = {}) {
  const named = label ? { "aria-label": label, title: label } : {};
  const all = { type: "button", className: `loom-button ${className}`.trim(), onClick: does, ...named, ...given };
  return make("button", all, face);
}

/** A function that calls `does` with its latest arguments when nobody has called it for `wait` milliseconds. */
export function later(does, wait) {
  let timer = 0;
  const call = (...given) => {
    clearTimeout(timer);
    timer = setTimeout(does, wait, ...given);
  };
  call.cancel = () => clearTimeout(timer);
  return call;
}

/** The index an arrow key leads to among `count` things; null for any other key. */
export function moved(key, index, count, [back, forth] = ["ArrowLeft", "ArrowRight"]) {
  const target = { [back]: index - 1, [forth]: index + 1, Home: 0, End: count - 1 }[key];
  return target === undefined || !count ? null : Math.max(0, Math.min(count - 1, target));
}

/** Keep a key from whatever lies around a field or list that has used it. */
export function used(event) {
  event.preventDefault();
  event.stopPropagation();
}

export function many(count, thing) {
  return `${count.toLocaleString("en")} ${thing}${count === 1 ? "" : "s"}`;
}
