/**
 * The panel of one training: how it goes, its curves and pictures, and the buttons that steer it.
 *
 * - compact on a node, with more room in the bottom panel
 * - drawn anew when the training tells something, and each second while it runs, for the time
 * - keys and mouse inside belong to the panel: the graph below neither moves nor deletes anything
 */

import { makeChart } from "./chart.mjs";
import { makeButtons, makeLooks } from "./controls.mjs";
import { secondsPerStep } from "./curves.mjs";
import { addStyle } from "../styles.mjs";
import { el, say, STYLE } from "./dom.mjs";
import { clock, count, duration, gigabytes, pace, short } from "./figures.mjs";
import { makePreviews } from "./previews.mjs";
import { ENDED } from "./store.mjs";

const CHART = 120; // pixels, at least
const GAP = 6; // as in panel.css
const PADDING = 9; // with its border
const STATES = {
  preparing: "preparing",
  training: "training",
  paused: "paused",
  saving: "saving",
  previewing: "making a preview",
  validating: "validating",
  done: "done",
  stopped: "stopped",
  failed: "failed",
  lost: "interrupted",
  past: "past run",
};

/** {element, key, show(key), dispose()}; `open` leads to the larger panel and stands on the compact one. */
export function makePanel(trainings, { compact = false, open = null } = {}) {
  addStyle(STYLE);
  const chart = makeChart();
  const looks = makeLooks();
  const buttons = makeButtons(trainings);
  const previews = makePreviews({ withStrip: !compact });
  const state = el("span", { className: "loom-run-state" });
  const name = el("b", { className: "loom-run-name" });
  const figures = el("div", { className: "loom-run-figures" });
  const counts = { role: "progressbar", aria: { label: "Steps", valuemin: 0 } };
  const bar = el("div", { className: "loom-run-bar", ...counts }, el("i"));
  const why = el("div", { className: "loom-run-why", role: "alert", hidden: true });
  const label = "Show in the bottom panel";
  const larger = el(
    "button",
    { type: "button", className: "loom-run-icon", title: label, aria: { label }, onclick: () => open(panel.key) },
    el("i", { className: "pi pi-external-link" }),
  );
  const gap = el("span", { className: "loom-run-gap" });
  const curves = el("div", { className: "loom-run-curves" }, chart.element, looks.element);
  const steering = el("div", { className: "loom-run-row" }, buttons.element, buttons.note);
  const element = el(
    "section",
    { className: `loom-run ${compact ? "loom-run-compact" : "loom-run-wide"}`, aria: { label: "Training" } },
    el("header", { className: "loom-run-row" }, state, name, gap, compact ? larger : steering),
    figures,
    bar,
    why,
    el("div", { className: "loom-run-body" }, curves, previews.element),
    compact && steering,
  );
  keepInside(element);

  function render() {
    const training = trainings.get(panel.key);
    if (!training) return;
    element.dataset.state = training.state;
    say(state, STATES[training.state] ?? training.state);
    say(name, training.run);
    name.title = training.run;
    tell(figures, figuresOf(training, compact));
    const done = training.total ? Math.min(1, training.step / training.total) : 0;
    bar.hidden = !training.total;
    bar.firstChild.style.width = `${done * 100}%`;
    bar.setAttribute("aria-valuemax", training.total ?? 0);
    bar.setAttribute("aria-valuenow", training.step ?? 0);
    say(why, training.why ?? "");
    why.hidden = !training.why;
    why.dataset.level = ["failed", "lost"].includes(training.state) ? "error" : "hint";
    looks.show(training.curves);
    chart.show(training.curves, labelOf(training));
    previews.show(training);
    buttons.show(training);
  }

  let frame = 0;
  const soon = () => (frame ||= requestAnimationFrame(() => ((frame = 0), element.isConnected && render())));
  const changed = ({ detail }) => detail === panel.key && soon();
  trainings.addEventListener("training", changed);
  const ticking = setInterval(() => {
    const training = trainings.get(panel.key);
    if (training && !ENDED.includes(training.state) && !document.hidden) soon();
  }, 1000);

  const panel = {
    element,
    key: null,
    /** Pixels that everything takes with a chart that is just large enough. */
    height() {
      const rows = [...element.children].filter(({ hidden }) => !hidden);
      const inside = [looks.element, previews.element].filter(({ hidden }) => !hidden);
      const body = inside.reduce((sum, row) => sum + row.offsetHeight + GAP, CHART);
      const around = rows.reduce((sum, row) => sum + (row.contains(chart.element) ? body : row.offsetHeight) + GAP, 0);
      return Math.ceil(around + 2 * PADDING);
    },
    show(key) {
      panel.key = key;
      trainings.load(key);
      render();
    },
    dispose() {
      trainings.removeEventListener("training", changed);
      clearInterval(ticking);
      cancelAnimationFrame(frame);
      chart.dispose();
      looks.dispose();
    },
  };
  return panel;
}

/** [[name, value, title]] of what is worth telling now. */
function figuresOf(training, compact) {
  const { step, total, started, ended, seconds_left: left, memory, curves } = training;
  const isOver = ENDED.includes(training.state);
  const found = [["step", total ? `${count(step)} / ${count(total)}` : count(step)]];
  const each = secondsPerStep(curves);
  if (Number.isFinite(each)) found.push(["speed", pace(each)]);
  const until = ended ?? (isOver ? NaN : clock());
  if (started) found.push(["time", duration(until - started), "since the training began"]);
  if (!isOver && Number.isFinite(left)) found.push(["left", duration(left), "at the speed so far"]);
  if (!isOver && memory?.total) {
    const [used, all] = [gigabytes(memory.total - memory.free), gigabytes(memory.total)];
    found.push(["memory", `${used} / ${all} GB`, "in use on the device that trains, by all programs"]);
  }
  const loss = curves.loss?.value.at(-1);
  if (Number.isFinite(loss) && !compact) found.push(["loss", short(loss, 4), "of the last step"]);
  return found.filter(([, value]) => value !== "–");
}

/** Figures with their names, kept in place while only values change. */
function tell(element, found) {
  const names = found.map(([name]) => name).join();
  if (element.dataset.names !== names) {
    element.dataset.names = names;
    element.replaceChildren(
      ...found.map(([name]) => {
        const value = el("span", { className: "loom-run-value" });
        return el("span", { data: { figure: name } }, el("small", { text: name }), value);
      }),
    );
  }
  found.forEach(([, value, title = ""], index) => {
    say(element.children[index].lastChild, value);
    element.children[index].title = title;
  });
}

function labelOf({ run, step, curves }) {
  const loss = curves.loss?.value.at(-1);
  return `Loss of ${run}${Number.isFinite(loss) ? `: ${short(loss)} at step ${count(step)}` : ""}`;
}

/** What is pressed in the panel is not the graph's; chords such as Ctrl+Enter still are the page's. */
function keepInside(element) {
  for (const name of ["pointerdown", "pointerup", "mousedown", "dblclick", "contextmenu"]) {
    element.addEventListener(name, (event) => event.stopPropagation());
  }
  element.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
  });
}
