/**
 * An edit before it is done: how many images would change, a few of them before and after, what has no effect.
 *
 * - nothing can be applied but what was previewed, on the captions as they were then
 * - a newer line, another selection or another edit asks anew; what is shown stays until the answer is there
 */

import { diffView } from "./diff.mjs";
import { button, later, make, many } from "./dom.mjs";
import { nameOf } from "./images.mjs";

const QUIET = 200; // milliseconds without a change before the server is asked

/**
 * @param {import("./store.mjs").Store} store
 * @param {object} [options]
 * @param {() => void} [options.applied] called when the edit has been done
 * @param {() => void} [options.cancel] adds a button that calls it
 */
export function proposal(store, { applied = () => {}, cancel } = {}) {
  let [wanted, ready, asked] = [null, null, 0];
  let isAwaited = false; // by the focus
  const said = make("p", { className: "loom-verdict", role: "status" });
  const notes = make("ul", { className: "loom-notes" });
  const examples = make("div", { className: "loom-examples" });
  const apply = button("Apply", () => run(), { className: "primary", disabled: true, data: { loom: "apply" } });
  const stop = cancel && button("Cancel", cancel);
  const buttons = make("div", { className: "loom-row" }, apply, stop);
  const element = make("div", { className: "loom-proposal", hidden: true }, said, buttons, notes, examples);

  const say = (text, level = "info") => {
    said.textContent = text;
    said.dataset.level = level;
  };

  const clear = () => {
    notes.replaceChildren();
    examples.replaceChildren();
  };

  const ask = later(async () => {
    if (!wanted || !store.state) return;
    const [number, { line, images }, revision] = [++asked, wanted, store.state.revision];
    try {
      const ids = typeof images === "function" ? await images() : images;
      const found = await store.preview(line, ids);
      if (number !== asked) return;
      const names = await Promise.all(found.examples.map(({ image }) => nameOf(store, image)));
      if (number !== asked) return;
      ready = found.count ? { line, images: ids, revision } : null;
      say(verdict(found), found.count ? "ok" : "warn");
      notes.replaceChildren(...found.notes.map((note) => make("li", {}, note)));
      examples.replaceChildren(...found.examples.map((example, index) => exampleOf(names[index], example)));
      const more = found.count - found.examples.length;
      if (found.examples.length && more) examples.append(make("p", { className: "loom-faint" }, `and ${more} more`));
    } catch (error) {
      if (number !== asked) return;
      clear();
      say(error.message, "error");
    }
    apply.disabled = !ready;
    if (isAwaited) (ready ? apply : (stop ?? apply)).focus();
    isAwaited = false;
  }, QUIET);

  /** Preview a line for some images (ids, or a function that promises them), or for those it says itself. */
  const propose = (line, images = null) => {
    wanted = { line, images };
    element.hidden = false;
    again();
  };

  const again = () => {
    asked++;
    ready = null;
    apply.disabled = true;
    ask();
  };

  /** Nothing to preview; `why` says what is missing. */
  const withdraw = (why = "") => {
    ask.cancel();
    asked++;
    [wanted, ready, isAwaited] = [null, null, false];
    apply.disabled = true;
    element.hidden = !why;
    clear();
    say(why, "hint");
  };

  const run = async () => {
    if (!ready || ready.revision !== store.state?.revision) return again();
    const { line, images } = ready;
    ready = null;
    apply.disabled = true;
    if (await store.edit(line, images)) applied();
  };

  return {
    element,
    propose,
    withdraw,
    apply: run,
    /** Move the focus to the button that applies it, once that can be pressed. */
    focus: () => {
      isAwaited = true;
      element.scrollIntoView({ block: "nearest" });
    },
    /** To be called when the captions have changed. */
    update: () => wanted && again(),
  };
}

function exampleOf(name, { before, after }) {
  return make("div", {}, make("div", { className: "loom-example-name" }, name), diffView(before, after));
}

function verdict({ count, selected }) {
  if (!count) return selected ? `no image changes, of ${many(selected, "image")} looked at` : "no image is looked at";
  return `${many(count, "image")} change${count === 1 ? "s" : ""}, of ${selected.toLocaleString("en")} looked at`;
}
