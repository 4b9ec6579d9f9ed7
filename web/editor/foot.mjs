/**
 * The line at the foot: what was just done or went wrong, with what can be done about it.
 */

import { button, make } from "./dom.mjs";

const SIGNS = { ok: "✓ ", info: "", warn: "⚠ ", error: "✕ " };

export class Foot {
  #text = make("span", { className: "loom-foot-text" });
  #action = make("span");
  element = make("footer", { className: "loom-foot", role: "status", "aria-live": "polite" }, this.#text, this.#action);

  constructor(store) {
    store.addEventListener("said", ({ detail }) => this.say(detail));
    store.addEventListener("failed", ({ detail }) => this.say({ text: detail.message, level: "error" }));
  }

  say({ text, level = "info", action }) {
    this.#text.textContent = this.#text.title = SIGNS[level] + text;
    this.#text.dataset.level = level;
    this.element.setAttribute("role", level === "error" ? "alert" : "status");
    const act = () => {
      this.#action.replaceChildren();
      action.do();
    };
    this.#action.replaceChildren(...(action ? [button(action.text, act)] : []));
  }
}
