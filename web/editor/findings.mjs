/**
 * The panel of what the check finds: what is wrong with which images, and its cure.
 *
 * - counts by level, each a switch that shows or hides its findings; the worst stand first
 * - a button selects the images; what an edit can cure has another one, with a preview of what it would change, for all
 *   of the images or the one at the cursor
 */

import { button, make, many } from "./dom.mjs";
import { showImages } from "./images.mjs";
import { proposal } from "./proposal.mjs";

const LEVELS = {
  error: { sign: "✕", name: "error" },
  warn: { sign: "⚠", name: "warning" },
  info: { sign: "ℹ", name: "note" },
};
const WORST = Object.keys(LEVELS);
const SLOW = 150; // milliseconds before it is said that the check is running

const keyOf = ({ rule, message }) => `${rule} ${message}`;

export function findingsPanel(store) {
  let [found, cursor, asked] = [null, null, 0];
  let fixed = null; // the finding whose cure is previewed
  const shown = new Set(WORST);
  const levels = make("div", { className: "loom-row", role: "group", "aria-label": "Levels that are shown" });
  const told = make("p", { className: "loom-faint", role: "status" });
  const list = make("ul", { className: "loom-findings" });
  const plan = proposal(store, { applied: () => end(), cancel: () => end() });
  const element = make("div", { className: "loom-panel-body" }, levels, told, list);

  const draw = () => {
    levels.replaceChildren(...WORST.map(levelOf));
    const visible = found.filter(({ level }) => shown.has(level));
    visible.sort((one, other) => WORST.indexOf(one.level) - WORST.indexOf(other.level));
    const focused = plan.element.contains(document.activeElement) ? document.activeElement : null;
    list.replaceChildren(...visible.map(cardOf));
    focused?.focus();
    told.textContent = found.length ? "All are hidden: switch a level on." : "Nothing was found.";
    told.hidden = visible.length > 0;
  };

  const levelOf = (level) => {
    const { sign, name } = LEVELS[level];
    const flip = () => {
      if (!shown.delete(level)) shown.add(level);
      draw();
      levels.querySelector(`[data-level=${level}]`).focus();
    };
    const face = `${sign} ${many(found.filter((each) => each.level === level).length, name)}`;
    return button(face, flip, { className: "loom-badge", "aria-pressed": String(shown.has(level)), data: { level } });
  };

  const cardOf = (finding) => {
    const { rule, title, level, message, cure } = finding;
    const { concepts } = store.state;
    const concept = concepts.length > 1 ? concepts[finding.concept]?.name : "";
    const where = concept && !message.includes(concept) ? `${concept}: ` : "";
    const sign = make("span", { data: { level }, role: "img", "aria-label": LEVELS[level].name }, LEVELS[level].sign);
    return make(
      "li",
      { className: "loom-finding", data: { rule, level } },
      make(
        "div",
        { className: "loom-finding-head" },
        sign,
        make("span", { className: "loom-finding-title" }, title),
        make("span", { className: "loom-count" }, rule),
      ),
      make("div", {}, where + message),
      cure && make("div", { className: "loom-faint" }, cure),
      make("div", { className: "loom-row loom-wrap" }, ...cures(finding)),
      keyOf(finding) === fixed && plan.element,
    );
  };

  const cures = (finding) => {
    const { line, images, rule } = finding;
    const all = many(images.length, "image");
    const small = { className: "small" };
    const buttons = [];
    if (images.length) buttons.push(button(`Select ${all}`, () => showImages(store, images), small));
    if (!line || !images.length) return buttons;
    buttons.push(button("Fix…", () => fix(finding, images), { ...small, label: `Fix ${rule} on ${all}` }));
    if (images.length > 1 && images.includes(store.cursor)) {
      buttons.push(button("Fix this image…", () => fix(finding, [store.cursor]), small));
    }
    return buttons;
  };

  const fix = (finding, images) => {
    fixed = keyOf(finding);
    plan.propose(finding.line, images);
    draw();
    plan.focus();
  };

  const end = () => {
    fixed = null;
    plan.withdraw();
    draw();
  };

  const update = async () => {
    const number = ++asked;
    const slow = setTimeout(() => {
      told.hidden = false;
      told.textContent = "Checking…";
    }, SLOW);
    try {
      const now = await store.findings();
      if (number !== asked) return;
      if (now === found && store.cursor === cursor) return;
      if (now !== found) plan.update();
      [found, cursor] = [now, store.cursor];
      if (!found.some((each) => keyOf(each) === fixed)) end();
      else draw();
    } finally {
      clearTimeout(slow);
      if (found) told.hidden = list.childElementCount > 0;
    }
  };
  return { id: "findings", title: "Findings", element, update };
}
