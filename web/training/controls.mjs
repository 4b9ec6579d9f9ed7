/**
 * What a training is told by buttons, and how its curves are looked at.
 *
 * - a button works while the server says that the wish is possible, and turns until it is answered
 * - the answer's note, or why the wish was refused, is shown beside
 */

import { el, say } from "./dom.mjs";
import { count } from "./figures.mjs";
import { view } from "./view.mjs";

const BUTTONS = [
  ["pause", "Pause", "pause", "Wait after this step; the model is kept ready"],
  ["save", "Save now", "save", "Write the LoRA and the state of this step to the run's folder"],
  ["preview", "Preview now", "image", "Make pictures with the LoRA so far"],
  ["stop", "Stop and keep", "stop", "End the training here; the graph goes on with the LoRA so far"],
];
const ANSWERS = {
  stop: "stopped",
  save: "saved",
  preview: "preview made",
  pause: "paused",
  continue: "goes on",
};
const MOST_SMOOTHING = 0.99;
const CURVES = [
  ["loss", "loss"],
  ["validation", "validation"],
  ["bands", "by timestep"],
  ["rate", "learning rate"],
];

/** {element, note, show(training)}: the buttons, and the line that tells of answers. */
export function makeButtons(trainings) {
  let training = null;
  const buttons = BUTTONS.map(([wish, label, icon, title]) => {
    const text = el("span", { text: label });
    const sign = el("i", { className: `pi pi-${icon}`, aria: { hidden: true } });
    const button = el("button", { type: "button", className: "loom-run-button", title, data: { wish } }, sign, text);
    button.addEventListener("click", () => {
      if (button.getAttribute("aria-disabled") !== "true") trainings.ask(training.key, button.dataset.wish);
    });
    return { wish, button, sign, text };
  });
  const element = el("div", { className: "loom-run-buttons", role: "group", aria: { label: "Steer the training" } });
  element.append(...buttons.map(({ button }) => button));
  const note = el("div", { className: "loom-run-note", role: "status" });

  function show(shown) {
    training = shown;
    const isOver = !training.can?.length;
    element.hidden = isOver;
    for (const { wish, button, sign, text } of buttons) {
      const isPaused = wish === "pause" && Boolean(training.can?.includes("continue"));
      const does = isPaused ? "continue" : wish;
      if (wish === "pause") {
        say(text, isPaused ? "Continue" : "Pause");
        button.dataset.wish = does;
        button.title = isPaused ? "Go on with the next step" : BUTTONS[0][3];
      }
      const isBusy = training.asking.has(does) || waits(training, does);
      sign.className = `pi ${isBusy ? "pi-spin pi-spinner" : `pi-${icon(wish, isPaused)}`}`;
      button.setAttribute("aria-busy", isBusy);
      // not `disabled`, which would take the focus away under somebody's fingers
      button.setAttribute("aria-disabled", isBusy || !training.can?.includes(does));
    }
    const [text, level] = noteOf(training);
    say(note, text);
    note.dataset.level = level;
    note.hidden = !text;
  }
  return { element, note, show };
}

const icon = (wish, isPaused) => (isPaused ? "play" : BUTTONS.find(([name]) => name === wish)[2]);

/** Whether somebody has asked for it, and it was not answered yet. */
const waits = ({ wishes, can }, wish) => {
  return Boolean(can?.length) && wishes.some(({ do: asked, step }) => asked === wish && step === null);
};

/** What to tell of the last wish: [text, level]. */
function noteOf({ wishes, refusal }) {
  if (refusal) return [refusal, "warn"];
  const last = wishes.findLast(({ step }) => step !== null);
  if (!last) return ["", ""];
  const label = BUTTONS.find(([wish]) => wish === last.do)?.[1] ?? "Continue";
  return last.note ? [`${label}: ${last.note}`, "warn"] : [`${ANSWERS[last.do]} at step ${count(last.step)}`, "ok"];
}

/** {element, show(curves)}: which curves are drawn, how smooth, on which axis; the same for all panels. */
export function makeLooks() {
  const toggles = CURVES.map(([name, text]) => {
    const swatch = el("i", { aria: { hidden: true } });
    const onclick = () => view.set(name, !view.values[name]);
    const given = { type: "button", className: "loom-run-toggle", data: { curve: name }, onclick };
    return [name, el("button", given, swatch, text)];
  });
  const log = el("button", {
    type: "button",
    className: "loom-run-toggle",
    text: "log",
    title: "Logarithmic axis",
    data: { curve: "log" },
    onclick: () => view.set("log", !view.values.log),
  });
  const shown = el("output", { className: "loom-run-figure" });
  const smoothing = el("input", {
    type: "range",
    className: "loom-run-slider",
    min: 0,
    max: MOST_SMOOTHING,
    step: 0.01,
    title: "How much of the values before each one counts",
    aria: { label: "Smoothing" },
    oninput: () => view.set("smoothing", Number(smoothing.value)),
  });
  const refresh = () => {
    for (const [name, toggle] of [...toggles, ["log", log]]) toggle.setAttribute("aria-pressed", view.values[name]);
    smoothing.value = view.values.smoothing;
    say(shown, view.values.smoothing.toFixed(2));
  };
  refresh();
  view.addEventListener("change", refresh);
  const label = el("label", { className: "loom-run-smoothing" }, el("span", { text: "smoothing" }), smoothing, shown);
  const element = el("div", { className: "loom-run-looks", role: "group", aria: { label: "Curves" } });
  element.append(...toggles.map(([, toggle]) => toggle), log, label);
  return {
    element,
    show(curves) {
      const has = (start) => Object.keys(curves).some((name) => name.startsWith(start));
      const there = { loss: true, validation: has("validation"), bands: has("loss at "), rate: has("learning_rate") };
      for (const [name, toggle] of toggles) toggle.hidden = !there[name];
    },
    dispose: () => view.removeEventListener("change", refresh),
  };
}
