/**
 * Pictures that a training has shown on its way, each beside that of the base model.
 *
 * - a slider goes through the steps, by mouse and arrow keys; at its end it follows what comes
 * - a strip of some of them, evenly chosen; a click on a picture enlarges it, in a dialog with the same keys
 * - the server sends one sheet a step, the base on its left half: it is cut in two here, the names stand below
 */

import { pictures } from "./client.mjs";
import { el, say } from "./dom.mjs";
import { count } from "./figures.mjs";

const LINE = 14; // pixels above the pictures of a sheet, where their names stand
const GAP = 6; // between the base's and the step's
const THUMBS = 8;

/** {element, show(training)}; `withStrip` where there is room for it. */
export function makePreviews({ withStrip }) {
  const state = { training: null, steps: [], index: -1, loading: 0 };
  const base = makeHalf("left");
  const now = makeHalf("right");
  const slider = el("input", {
    type: "range",
    min: 0,
    step: 1,
    className: "loom-run-slider",
    aria: { label: "Step of the preview" },
    oninput: () => choose(Number(slider.value)),
  });
  const strip = el("div", { className: "loom-run-strip", role: "group", aria: { label: "Previews" } });
  const enlarge = () => enlarged(state, choose);
  const label = "Enlarge the preview";
  const pair = el(
    "button",
    { type: "button", className: "loom-run-pair", title: label, onclick: enlarge, aria: { label } },
    el("figure", {}, base.element, el("figcaption", { text: "base" })),
    el("figure", {}, now.element, now.caption),
  );
  const element = el("div", { className: "loom-run-previews", hidden: true }, pair, slider, withStrip && strip);

  async function choose(index) {
    state.index = index;
    slider.value = index;
    const step = state.steps[index];
    say(now.caption, `step ${count(step)}`);
    slider.setAttribute("aria-valuetext", `step ${count(step)}`);
    for (const thumb of strip.children) thumb.setAttribute("aria-current", Number(thumb.dataset.step) === step);
    const turn = ++state.loading;
    const sheet = await loaded(pictures(state.training, step));
    if (turn !== state.loading) return; // another was chosen meanwhile
    element.classList.toggle("loom-run-missing", !sheet);
    if (!sheet) return say(now.caption, `step ${count(step)}: no picture any more`);
    for (const half of [base, now]) half.show(sheet);
  }

  function fillStrip() {
    const chosen = evenly(state.steps, THUMBS);
    const shown = [...strip.children].map((thumb) => Number(thumb.dataset.step));
    if (String(shown) === String(chosen)) return;
    strip.replaceChildren(
      ...chosen.map((step) => {
        const half = makeHalf("right");
        loaded(pictures(state.training, step)).then((sheet) => sheet && half.show(sheet));
        return el(
          "button",
          {
            type: "button",
            className: "loom-run-thumb",
            data: { step },
            title: `Step ${count(step)}`,
            onclick: () => choose(state.steps.indexOf(step)),
          },
          half.element,
          el("span", { text: count(step) }),
        );
      }),
    );
  }

  return {
    element,
    show(training) {
      const isOther = training.key !== state.training?.key;
      const wasLast = state.index === state.steps.length - 1;
      const before = state.steps[state.index];
      const hasMore = isOther || String(training.previews) !== String(state.steps);
      Object.assign(state, { training, steps: [...training.previews] });
      element.hidden = !state.steps.length;
      if (!hasMore || element.hidden) return;
      slider.max = state.steps.length - 1;
      slider.disabled = state.steps.length < 2;
      if (isOther) strip.replaceChildren();
      if (withStrip) fillStrip();
      choose(isOther || wasLast ? state.steps.length - 1 : Math.max(0, state.steps.indexOf(before)));
    },
  };
}

/** One half of a sheet: {element, caption, show(sheet)}. */
function makeHalf(side) {
  const canvas = el("canvas", { className: "loom-run-half", width: 1, height: 1, role: "img" });
  const caption = el("figcaption", { text: "" });
  const show = (sheet) => {
    const [width, height] = [Math.floor((sheet.naturalWidth - GAP) / 2), sheet.naturalHeight - LINE];
    Object.assign(canvas, { width, height });
    const from = side === "left" ? 0 : sheet.naturalWidth - width;
    canvas.getContext("2d").drawImage(sheet, from, LINE, width, height, 0, 0, width, height);
    canvas.setAttribute("aria-label", side === "left" ? "what the base model gives" : "what the LoRA gives");
  };
  return { element: canvas, caption, show };
}

/** The picture at an address once it is there; null where there is none. */
async function loaded(address) {
  const picture = new Image();
  picture.src = address;
  return picture.decode().then(
    () => picture,
    () => null,
  );
}

/** At most `most` of them, the first and the last among them. */
function evenly(steps, most) {
  if (steps.length <= most) return steps;
  return Array.from({ length: most }, (_, index) => steps[Math.round((index * (steps.length - 1)) / (most - 1))]);
}

/** A dialog with the pictures as large as the window, led by the same index. */
function enlarged(state, choose) {
  const [base, now] = [makeHalf("left"), makeHalf("right")];
  const show = async () => {
    const step = state.steps[state.index];
    say(now.caption, `step ${count(step)}`);
    const sheet = await loaded(pictures(state.training, step));
    if (sheet && step === state.steps[state.index]) for (const half of [base, now]) half.show(sheet);
  };
  const move = (by) => {
    choose(Math.min(state.steps.length - 1, Math.max(0, state.index + by)));
    show();
  };
  const turn = (text, label, by) => {
    const given = { text, title: label, aria: { label }, onclick: () => move(by) };
    return el("button", { type: "button", className: "loom-run-button", ...given });
  };
  const dialog = el(
    "dialog",
    { className: "loom-run loom-run-large", aria: { label: "Preview beside the base" } },
    el(
      "div",
      { className: "loom-run-row" },
      turn("‹", "Earlier step (←)", -1),
      turn("›", "Later step (→)", 1),
      el("span", { className: "loom-run-gap" }),
      el("button", { type: "button", className: "loom-run-button", text: "Close", onclick: () => dialog.close() }),
    ),
    el(
      "div",
      { className: "loom-run-pair" },
      el("figure", {}, base.element, el("figcaption", { text: "base" })),
      el("figure", {}, now.element, now.caption),
    ),
  );
  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the graph behind has keys of its own
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -state.index, End: state.steps.length }[event.key];
    if (steps === undefined) return;
    event.preventDefault();
    move(steps);
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  show();
}
