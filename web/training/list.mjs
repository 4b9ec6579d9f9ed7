/**
 * The bottom tab: all trainings there are, those that wait in the queue and runs of before; the chosen one beside.
 *
 * - follows what runs until another is chosen; what was queued from elsewhere appears by itself
 * - arrow keys go through the list, Enter and a click choose
 */

import { addStyle } from "../styles.mjs";
import { el, say, STYLE } from "./dom.mjs";
import { ago, clock, count } from "./figures.mjs";
import { makePanel } from "./panel.mjs";
import { ENDED } from "./store.mjs";

/** Fills `container`; returns {choose(key), dispose()}. */
export function makeTab(trainings, container) {
  addStyle(STYLE);
  const panel = makePanel(trainings);
  const list = el("nav", { className: "loom-run-list", aria: { label: "Trainings" } });
  const nothing = el("div", { className: "loom-run-nothing" });
  const element = el("div", { className: "loom-run-tab loom-runs" }, list, panel.element, nothing);
  container.replaceChildren(element);
  container.style.height = "100%"; // the host's own has none
  const items = () => [...list.querySelectorAll("button")];
  let chosen = null; // by hand; else what runs, else the last

  function render() {
    const all = trainings.all().reverse();
    const key = chosen ?? (all.find(({ state }) => !ENDED.includes(state)) ?? all[0])?.key;
    const shown = new Set(all.map(({ run }) => run));
    const past = trainings.runs.filter(({ run }) => !shown.has(run));
    const waiting = trainings.waiting.map(({ run, node }) => ({ name: run ?? `node ${node}`, state: "waiting" }));
    fill(list, [
      ["Trainings", all.map((training) => entry(training))],
      ["Waiting in the queue", waiting],
      ["Past runs", past.map((run) => pastEntry(run))],
    ]);
    for (const item of items()) {
      if (item.dataset.key === key) item.setAttribute("aria-current", "true");
      else item.removeAttribute("aria-current");
    }
    panel.element.hidden = !key;
    nothing.hidden = Boolean(key);
    nothing.textContent = past.length
      ? "No training since the server was started. Choose a past run."
      : "No training yet. Queue a workflow with a LoRA Trainer, and its curves appear here.";
    if (key && key !== panel.key) panel.show(key);
  }

  const entry = ({ key, run, state, step, total }) => ({
    ...{ key, name: run, state },
    detail: state === "done" || !total ? state : `${state} · ${count(step)} / ${count(total)}`,
    choose: () => choose(key),
  });
  const pastEntry = ({ run, step, time }) => ({
    ...{ key: `run:${run}`, name: run, state: "past" },
    detail: [Number.isFinite(step) && `step ${count(step)}`, time && ago(clock() - time)].filter(Boolean).join(" · "),
    choose: async () => {
      try {
        choose(await trainings.loadRun(run));
      } catch (error) {
        panel.element.hidden = true;
        Object.assign(nothing, { hidden: false, textContent: error.message });
      }
    },
  });

  function choose(key) {
    chosen = key;
    render();
  }

  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    event.stopPropagation();
    const all = items();
    const here = all.indexOf(document.activeElement);
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    all[Math.min(all.length - 1, Math.max(0, to))]?.focus();
  });
  /** How far it is, in its place. */
  const told = ({ detail: key }) => {
    const detail = items().find(({ dataset }) => dataset.key === key)?.querySelector("small");
    const training = trainings.get(key);
    if (detail && training.id) say(detail, entry(training).detail);
  };
  const ask = () => Promise.all([trainings.refresh(), trainings.refreshRuns().catch(() => {})]);
  trainings.addEventListener("list", render);
  trainings.addEventListener("training", told);
  render();
  ask();
  return {
    choose,
    dispose() {
      trainings.removeEventListener("list", render);
      trainings.removeEventListener("training", told);
      panel.dispose();
    },
  };
}

/** The list anew; whoever has the focus keeps it. */
function fill(list, groups) {
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  list.replaceChildren(
    ...groups
      .filter(([, items]) => items.length)
      .map(([title, items]) => el("section", {}, el("h4", { text: title }), ...items.map(row))),
  );
  if (focused) [...list.querySelectorAll("button")].find(({ dataset }) => dataset.key === focused)?.focus();
}

function row({ key, name, state, detail, choose }) {
  const dot = el("i", { aria: { hidden: true } });
  const parts = [dot, el("span", { text: name }), detail && el("small", { text: detail })];
  const className = "loom-run-item";
  if (!choose) return el("div", { className, data: { state } }, ...parts);
  return el("button", { type: "button", className, data: { key, state }, title: name, onclick: choose }, ...parts);
}
