/**
 * The nodes that put a LoRA on a model, in the page.
 *
 * - below their widgets lies a line with the weights of blocks and over the run; it opens to bars and a curve
 * - the text widgets stay what counts: they are drawn from, and written into
 */

import { app } from "../../scripts/app.js";
import { after } from "./graph.mjs";
import { makeFrame } from "./weights/frame.mjs";
import { makePanel } from "./weights/panel.mjs";

const NODES = ["LoomLoRALoaderAdvanced", "LoomLoRAPair"];
const TEXTS = { blocks: "blocks", steps: "steps", interpolation: "interpolation", lora: "lora_name" };
const SOCKETS = ["lora", "lora_high"]; // while one is connected, lora_name says nothing
const MARGIN = 10; // around the panel on the canvas, the host's own
const OPEN = "loom_weights_open"; // kept with the node

app.registerExtension({
  name: "LoRALoom.LoaderNodes",
  nodeCreated(node) {
    if (NODES.includes(node.comfyClass)) addWeights(node);
  },
});

function addWeights(node) {
  let seen = null; // what the latest run told: {layout, on}
  let height = 28;
  const widget = (name) => node.widgets.find((each) => each.name === name);
  const isLinked = (name) => node.inputs?.some((input) => input.name === name && input.link != null) ?? false;
  const fields = {
    texts() {
      const found = Object.entries(TEXTS).map(([key, name]) => [key, String(widget(name)?.value ?? "")]);
      const lora = SOCKETS.some(isLinked) ? { lora: "" } : {};
      return { ...Object.fromEntries(found), ...lora, layout: seen?.layout ?? "" };
    },
    linked: isLinked,
    on: () => seen?.on ?? null,
    hasInterpolation: Boolean(widget("interpolation")),
    write(name, value) {
      const target = widget(TEXTS[name]);
      if (target.value === value) return;
      target.value = value;
      target.callback?.(value);
      app.canvas.setDirty(true, true);
    },
    /** An edit is over: the host's undo notes it. */
    settled() {
      app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.();
    },
  };
  const fit = (isByUser = false) => {
    const now = frame.content.offsetHeight;
    if (!now || now === height) return;
    const [width, before] = node.size;
    const grown = now - height;
    height = now;
    frame.element.style.height = `${height}px`;
    const least = node.computeSize()[1];
    node.setSize([width, Math.max(least, isByUser ? before + grown : before)]);
    app.canvas.setDirty(true, true);
  };
  const frame = makeFrame({
    fitted: fit,
    opened(isOpen) {
      node.properties[OPEN] = isOpen;
      fields.settled();
      if (isOpen) panel.listPresets();
    },
  });
  const panel = makePanel(fields, frame);
  const own = node.addDOMWidget("loom_weights", "loom_weights", frame.element, {
    serialize: false,
    getMinHeight: () => height + 2 * MARGIN,
    getMaxHeight: () => height + 2 * MARGIN,
  });
  own.serialize = false;
  new ResizeObserver(() => fit()).observe(frame.content);

  for (const name of Object.values(TEXTS)) after(widget(name), "callback", panel.later);
  after(node, "onConnectionsChange", panel.later);
  after(node, "onConfigure", () => {
    frame.open(Boolean(node.properties[OPEN]));
    if (node.properties[OPEN]) panel.listPresets();
    panel.later();
  });
  after(node, "onExecuted", (output) => {
    const [told] = output?.loom_blocks ?? [];
    if (!told) return;
    seen = told;
    panel.later();
  });
  panel.later();
}
