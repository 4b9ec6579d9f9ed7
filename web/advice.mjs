/**
 * Findings on a node, each with buttons for the values it advises.
 *
 * - an element of the page, as the status line is; empty and without height until there is something to say
 * - the level is told by a sign too, for those who see no colours; everything is reached by the keyboard
 */

const ROW = 22; // pixels, about one line
const LARGEST = 180; // pixels; more findings are scrolled to
const LEVELS = {
  error: { sign: "✕", colour: "var(--error-text, #ff4444)" },
  warn: { sign: "⚠", colour: "var(--p-yellow-500, #eab308)" },
  info: { sign: "ℹ", colour: "var(--descrip-text, #999)" },
};

/** Adds the list to `node`: {show(findings)}. `apply(change)` sets a value and resolves to whether it did. */
export function addAdvice(node, apply) {
  const element = document.createElement("div");
  element.setAttribute("role", "log");
  element.setAttribute("aria-label", "Advice on the options of this training");
  element.className = "loom-advice";
  Object.assign(element.style, {
    boxSizing: "border-box",
    width: 0, // with the next line: as wide as its node
    minWidth: "100%",
    overflowY: "auto",
    font: "12px/1.4 sans-serif",
  });
  let height = 0;
  const widget = node.addDOMWidget("loom_advice", "loom_advice", element, {
    serialize: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  const show = (findings) => {
    element.replaceChildren(...findings.map((finding) => row(finding, apply)));
    height = findings.length ? Math.min(LARGEST, 2 * ROW * findings.length) : 0;
    element.style.height = `${height}px`;
    const [width, now] = node.size;
    node.setSize([width, Math.max(now, node.computeSize()[1])]);
  };
  show([]);
  return { element, show };
}

function row({ rule, level, message, changes }, apply) {
  const { sign, colour } = LEVELS[level] ?? LEVELS.info;
  const line = document.createElement("div");
  line.dataset.rule = rule;
  line.dataset.level = level;
  line.style.padding = "2px 4px";
  const text = document.createElement("span");
  text.textContent = `${sign} ${message} `;
  text.style.color = colour;
  line.append(text, ...changes.map((change) => button(change, apply)));
  return line;
}

function button(change, apply) {
  const element = document.createElement("button");
  element.type = "button";
  element.textContent = `${change.option} → ${change.value}`;
  element.title = `Set ${change.option} to ${change.value}`;
  Object.assign(element.style, {
    margin: "0 4px 0 0",
    padding: "0 6px",
    color: "var(--input-text, #ddd)",
    background: "var(--comfy-input-bg, #222)",
    border: "1px solid var(--border-color, #4e4e4e)",
    borderRadius: "4px",
    cursor: "pointer",
  });
  element.addEventListener("click", async () => {
    if (!(await apply(change))) return;
    element.disabled = true;
    element.textContent = `✓ ${change.option} = ${change.value}`;
    element.style.cursor = "default";
  });
  return element;
}
