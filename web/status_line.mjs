/**
 * One line at the foot of a node: what can be done, how far it is, how it ended.
 *
 * - an element of the page, so it shows on the canvas and on nodes drawn by Vue alike
 * - saved neither in the workflow nor in the prompt
 * - colours are the theme's; the level is told by a sign too, for those who see no colours
 */

const HEIGHT = 26; // of the line itself
const MARGIN = 10; // around it on the canvas, the host's own
const LEVELS = {
  hint: { sign: "", colour: "var(--descrip-text, #999)" },
  busy: { sign: "", colour: "var(--input-text, #ddd)" },
  ok: { sign: "✓ ", colour: "var(--p-green-500, #4caf50)" },
  warn: { sign: "⚠ ", colour: "var(--p-yellow-500, #eab308)" },
  error: { sign: "✕ ", colour: "var(--error-text, #ff4444)" },
};

/**
 * Adds the line to `node`: {element, show(text, level, done), grow()}.
 * `done` is 0 to 1, for a bar behind the text; `grow` makes room where the node was measured without the line.
 */
export function addStatusLine(node, name) {
  const element = document.createElement("div");
  element.setAttribute("role", "status");
  element.className = "loom-status";
  Object.assign(element.style, {
    boxSizing: "border-box",
    width: 0, // with the next line: as wide as its node, however long the text
    minWidth: "100%",
    height: `${HEIGHT}px`,
    padding: "0 8px",
    font: "12px/24px sans-serif",
    textAlign: "center",
    whiteSpace: "nowrap",
    overflow: "hidden",
    textOverflow: "ellipsis",
    border: "1px dashed var(--border-color, #4e4e4e)",
    borderRadius: "6px",
  });
  const widget = node.addDOMWidget(name, "loom_status", element, {
    serialize: false,
    getMinHeight: () => HEIGHT + 2 * MARGIN,
    getMaxHeight: () => HEIGHT + 2 * MARGIN,
  });
  widget.serialize = false;
  const show = (text, level, done = 0) => {
    const { sign, colour } = LEVELS[level];
    element.textContent = sign + text;
    element.title = text;
    element.dataset.level = level;
    element.style.color = colour;
    const share = `${Math.round(done * 100)}%`;
    element.style.background = `linear-gradient(to right, var(--border-color, #4e4e4e) ${share}, transparent ${share})`;
  };
  const grow = () => {
    const [width, height] = node.size;
    node.setSize([width, Math.max(height, node.computeSize()[1])]);
  };
  return { element, show, grow };
}
