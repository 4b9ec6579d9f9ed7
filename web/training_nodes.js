/**
 * The training nodes in the page.
 *
 * - choosing a preset fills the widgets of its node; on the trainer also those of the settings nodes connected to it
 * - before the first step the trainer shows what the check of its options found, each with the values to click
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addAdvice } from "./advice.mjs";
import { nodeOf } from "./graph.mjs";
import { tell } from "./toasts.mjs";

const TRAINER = "LoomLoRATrainer";
const PARTS = {
  trainer: TRAINER,
  adapter: "LoomAdapterSettings",
  optimizer: "LoomOptimizerSettings",
  objective: "LoomObjectiveSettings",
  run: "LoomRunSettings",
  components: "LoomComponentSettings",
};
const PRESET = "preset";

app.registerExtension({
  name: "LoRALoom.TrainingNodes",
  setup() {
    api.addEventListener("loom.run_lint", ({ detail }) => {
      nodeOf(detail.node)?.loomAdvice?.show(detail.findings);
    });
  },
  nodeCreated(node) {
    const part = partOf(node);
    if (!part) return;
    const preset = widget(node, PRESET);
    const before = preset.callback;
    preset.callback = function (value, ...rest) {
      before?.call(this, value, ...rest);
      fillAll(node, part, value).catch((error) => tell("error", "The preset could not be read", error.message));
    };
    if (node.comfyClass !== TRAINER) return;
    const failed = (error) => tell("error", "The value could not be set", error.message);
    node.loomAdvice = addAdvice(node, (change) => apply(node, change).catch(failed));
  },
});

function partOf(node) {
  return Object.keys(PARTS).find((part) => PARTS[part] === node.comfyClass);
}

function widget(node, name) {
  return node.widgets?.find((each) => each.name === name);
}

function set(node, name, value) {
  const target = widget(node, name);
  if (!target) return false;
  target.value = value;
  if (name !== PRESET) target.callback?.(value);
  return true;
}

async function presets() {
  const answer = await api.fetchApi("/lora_loom/presets", { cache: "no-store" });
  if (!answer.ok) throw new Error(`the server answered ${answer.status} ${answer.statusText}`);
  return answer.json();
}

async function fillAll(node, part, name) {
  const chosen = (await presets())[name];
  if (!chosen) throw new Error(`the server knows no preset ${name}`);
  fill(node, part, chosen);
  if (part !== "trainer") return;
  for (const other of Object.keys(PARTS)) {
    const settings = other === part ? null : connected(node, other);
    if (!settings) continue;
    fill(settings, other, chosen);
    set(settings, PRESET, name);
  }
}

function fill(node, part, chosen) {
  for (const [name, value] of Object.entries(chosen[part] ?? {})) set(node, name, value);
  app.canvas.setDirty(true, true);
}

/** The settings node at the trainer's socket `part`; null where there is none, or something in between. */
function connected(trainer, part) {
  const index = trainer.inputs?.findIndex((input) => input.name === part) ?? -1;
  const origin = index < 0 ? null : trainer.getInputNode(index);
  return origin?.comfyClass === PARTS[part] ? origin : null;
}

/** Set what a finding advises; returns what happened, in words. */
async function apply(trainer, { part, option, value }) {
  if (part === "dataset") {
    tell("info", `${option} → ${value}`, "This is set on the nodes of the dataset.");
    return false;
  }
  const node = part === "trainer" ? trainer : (connected(trainer, part) ?? (await connect(trainer, part)));
  if (!node || !set(node, option, value)) {
    tell("warn", `${option} → ${value}`, `Set it on the node that leads to the trainer's socket ${part}.`);
    return false;
  }
  app.canvas.setDirty(true, true);
  return true;
}

/** A new settings node at a socket nothing is connected to, filled as the trainer's preset says. */
async function connect(trainer, part) {
  const index = trainer.inputs.findIndex((input) => input.name === part);
  if (index < 0 || trainer.inputs[index].link != null) return null;
  const settings = window.LiteGraph.createNode(PARTS[part]);
  trainer.graph.add(settings);
  settings.pos = [trainer.pos[0] - settings.size[0] - 60, trainer.pos[1]];
  settings.connectByType(0, trainer, trainer.inputs[index].type);
  const name = widget(trainer, PRESET)?.value;
  if (name && name !== "none") {
    fill(settings, part, (await presets())[name] ?? {});
    set(settings, PRESET, name);
  }
  return settings;
}
