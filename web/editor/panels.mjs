/**
 * The panels beside the pictures: Caption, Tags, Bulk, Findings and Write, or Program for a node.
 *
 * - tabs, walked by arrow keys; how many findings and unwritten captions there are stands on theirs
 * - only the panel in sight asks the server for anything, once per change, and the others when they are shown
 */

import { addStyle } from "../styles.mjs";
import { bulkPanel } from "./bulk.mjs";
import { captionPanel } from "./caption.mjs";
import { make, moved, used } from "./dom.mjs";
import { findingsPanel } from "./findings.mjs";
import { failed } from "./images.mjs";
import { tagPanel } from "./tag_table.mjs";
import { writingPanel } from "./writing.mjs";

const STYLES = new URL("./panels.css", import.meta.url).href;
const EVENTS = ["state", "rows", "selection", "cursor"];

/**
 * Put the panels into a column.
 *
 * @param {HTMLElement} column
 * @param {import("./store.mjs").Store} store
 * @returns {{show: (id: string, part?: string) => void, remove: () => void}} `show` moves the focus there: "caption",
 * with "add" to the field that adds tags, "tags", "bulk" with the id of a form, "findings", "write"
 */
export function addPanels(column, store) {
  addStyle(STYLES);
  const panels = [captionPanel, tagPanel, bulkPanel, findingsPanel, writingPanel].map((panel) => panel(store));
  const tabs = panels.map(tabOf);
  const bar = make("div", { className: "loom-tabs", role: "tablist", "aria-label": "Panels" }, ...tabs);
  const root = make("div", { className: "loom-panels" }, bar, ...panels.map(bodyOf));
  column.append(root);
  let [active, waiting] = [0, false];

  /** The panel in sight follows; several events at once are one change. */
  const refresh = () => {
    if (waiting) return;
    waiting = true;
    queueMicrotask(async () => {
      waiting = false;
      if (!store.state) return;
      name();
      try {
        await panels[active].update();
      } catch (error) {
        if (store.state) failed(store, error);
      }
    });
  };

  /** Titles and numbers on the tabs. */
  const name = () => {
    for (const [index, { id, title }] of panels.entries()) {
      const count = id === "write" ? store.state.unsaved : 0;
      tabs[index].firstChild.textContent = title;
      tabs[index].lastChild.textContent = count ? count.toLocaleString("en") : "";
      tabs[index].lastChild.hidden = !count;
    }
  };

  const show = (index, focus = false) => {
    active = index;
    for (const [at, tab] of tabs.entries()) {
      tab.setAttribute("aria-selected", String(at === index));
      tab.tabIndex = at === index ? 0 : -1;
      root.children[at + 1].hidden = at !== index;
    }
    if (focus) tabs[index].focus();
    refresh();
  };

  for (const [index, tab] of tabs.entries()) {
    tab.addEventListener("click", () => show(index));
    tab.addEventListener("keydown", (event) => {
      const target = moved(event.key, index, tabs.length);
      if (target === null || event.altKey || event.ctrlKey || event.metaKey) return;
      show(target, true);
      used(event);
    });
  }
  for (const event of EVENTS) store.addEventListener(event, refresh);
  show(0);
  return {
    show: (id, part) => {
      const index = panels.findIndex((panel) => panel.id === id);
      show(index, true);
      if (part) panels[index].start(part);
    },
    remove: () => {
      for (const event of EVENTS) store.removeEventListener(event, refresh);
      root.remove();
    },
  };
}

function tabOf({ id }) {
  return make(
    "button",
    { type: "button", className: "loom-tab", role: "tab", id: `loom-tab-${id}`, "aria-controls": `loom-panel-${id}` },
    make("span"),
    make("span", { className: "loom-tab-count", hidden: true }),
  );
}

function bodyOf({ id, element }) {
  const given = { role: "tabpanel", id: `loom-panel-${id}`, "aria-labelledby": `loom-tab-${id}` };
  return make("div", { className: "loom-panel", ...given }, element);
}
