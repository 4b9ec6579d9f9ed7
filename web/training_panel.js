/**
 * Trainings in the page: a panel on each LoRA Trainer, and all of them in the bottom panel.
 *
 * - one line on the node until it has trained, then a chart; the node keeps the size that its user gave it
 * - fed by the server's events while it trains; after a reload by what the server knows; by the node's output where the
 *   host took it from its cache or history
 * - a node shows the last training of its id and its run name, also inside subgraphs; what has no node in this graph is
 *   in the bottom panel
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { after, nodeOf } from "./graph.mjs";
import { addStyle } from "./styles.mjs";
import { el, STYLE } from "./training/dom.mjs";
import { makeTab } from "./training/list.mjs";
import { makePanel } from "./training/panel.mjs";
import { Trainings } from "./training/store.mjs";

const TRAINER = "LoomLoRATrainer";
const TAB = "lora-loom-trainings";
const TOGGLE = `Workspace.ToggleBottomPanelTab.${TAB}`;
const MARGIN = 10; // around an element on the canvas, the host's own
const LINE = 26; // pixels until there is a training
const UNSEEN = 300; // of a panel that is out of sight, and cannot be measured

const trainings = new Trainings();
let tab = null;
let wanted = null; // to be chosen once the tab is there

app.registerExtension({
  name: "LoRALoom.TrainingPanel",
  bottomPanelTabs: [
    {
      id: TAB,
      title: "LoRA Loom",
      type: "custom",
      render: (container) => {
        tab?.dispose();
        tab = makeTab(trainings, container);
        if (wanted) tab.choose(wanted);
        wanted = null;
      },
      destroy: () => {
        tab?.dispose();
        tab = null;
      },
    },
  ],
  setup() {
    trainings.addEventListener("list", place);
    api.addEventListener("status", () => tab && trainings.refresh()); // the queue has changed
    trainings.start();
  },
  nodeCreated(node) {
    if (node.comfyClass === TRAINER) addPanel(node);
  },
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs ?? {})) take(located(id), output); // of the host's history
  },
});

/** The panel's place on a node: `node.loomTraining` shows a training by its key. */
function addPanel(node) {
  addStyle(STYLE);
  const hint = el("div", { className: "loom-run-idle", text: "the training is shown here" });
  const element = el("div", { className: "loom-run-place" }, hint);
  let [panel, height] = [null, LINE];
  const widget = node.addDOMWidget("loom_training", "loom_training", element, {
    serialize: false,
    getMinHeight: () => height + 2 * MARGIN,
    getMaxHeight: () => (panel ? undefined : LINE + 2 * MARGIN),
  });
  widget.serialize = false;
  const fit = () => {
    const before = height;
    if (!panel) height = LINE;
    else height = panel.element.offsetWidth ? panel.height() : Math.max(height, UNSEEN);
    element.style.minHeight = `${height}px`;
    if (height !== before) grow();
  };
  const grow = () => {
    const [width, now] = node.size;
    node.setSize([width, Math.max(now, node.computeSize()[1])]); // only where its user gave it less
    app.canvas?.setDirty(true, true);
  };
  const show = (key) => {
    if (!panel) {
      panel = makePanel(trainings, { compact: true, open });
      element.replaceChildren(panel.element);
      sizes.observe(panel.element);
    }
    if (panel.key !== key) panel.show(key);
    fit();
  };
  const sizes = new ResizeObserver(() => panel && fit()); // a wider node has less to wrap
  const changed = ({ detail }) => detail === panel?.key && requestAnimationFrame(fit); // when it is drawn
  trainings.addEventListener("training", changed);
  fit();
  node.loomTraining = { element, show, key: () => panel?.key };
  grow();
  after(node, "onConfigure", () => {
    grow(); // a workflow brings a size, perhaps of a time before the panel
    setTimeout(place); // when it is in its graph
  });
  after(node, "onExecuted", (output) => take(node, output));
  after(node, "onRemoved", () => {
    trainings.removeEventListener("training", changed);
    sizes.disconnect();
    panel?.dispose();
  });
}

/** Each training to its node; of several the last. */
function place() {
  for (const training of trainings.all()) {
    const node = training.node === null ? null : nodeOf(training.node);
    if (node?.loomTraining && isOf(training, node)) node.loomTraining.show(training.key);
  }
}

/** Whether the node has made this training: another workflow has a node of the same id, but hardly of the same run. */
function isOf({ key, run }, node) {
  if (node.loomTraining.key() === key) return true;
  const input = node.inputs?.find(({ name }) => name === "run_name");
  const name = node.widgets.find((widget) => widget.name === "run_name")?.value;
  if (input?.link != null || typeof name !== "string") return true; // comes from another node
  return run === name.trim() || (run.startsWith(`${name.trim()}-`) && /^\d+$/.test(run.slice(name.trim().length + 1)));
}

/** What the host kept of a node's output. */
function take(node, output) {
  const key = node?.loomTraining && trainings.takeOutput(output?.loom_training?.[0]);
  if (key) node.loomTraining.show(key);
}

/** The node of an output: "7", or "<subgraph>:7". */
function located(id) {
  const [inner, subgraph] = String(id).split(":").reverse();
  const root = app.rootGraph ?? app.graph;
  const graph = subgraph === undefined ? root : root.subgraphs?.get(subgraph);
  return graph?.getNodeById(inner) ?? nodeOf(id);
}

/** Show a training in the bottom panel. */
function open(key) {
  if (tab) return tab.choose(key);
  wanted = key;
  app.extensionManager.command.execute(TOGGLE);
}
