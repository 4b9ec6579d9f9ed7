/**
 * What the editor opens for a node of the graph, and where its edits go.
 */

import { app } from "../../../scripts/app.js";

const EDITOR = "LoomTagEditor";
const LOADER = "LoomDatasetLoader";
const OF_LOADER = ["root", "folder", "resolution", "bucket_step", "trigger"];

export const OPENS = [EDITOR, LOADER];

const widget = (node, name) => node.widgets?.find((each) => each.name === name);

/** What the server is asked to open: what a loader's widgets say, or what a Tag Editor has had. */
export function bodyOf(node) {
  if (node.comfyClass === LOADER) return valuesOf(node, OF_LOADER);
  return { node: serverId(node), ...valuesOf(node, ["program", "implications"]) };
}

/** Takes up a Tag Editor's program; null for others. */
export function programOf(node) {
  if (node.comfyClass !== EDITOR) return null;
  return (text) => {
    const program = widget(node, "program");
    if (program.value === text) return;
    program.value = text;
    program.callback?.(text);
    app.canvas.setDirty(true, true);
  };
}

export const isEditor = (node) => node?.comfyClass === EDITOR;

/** What the server calls a node: "7", or "3:7" inside the subgraph of node 3. */
export function serverId(node) {
  return pathTo(node, app.rootGraph ?? app.graph)?.join(":") ?? String(node.id);
}

function pathTo(node, graph) {
  for (const each of graph?.nodes ?? graph?._nodes ?? []) {
    if (each === node) return [each.id];
    const inside = each.subgraph && pathTo(node, each.subgraph);
    if (inside) return [each.id, ...inside];
  }
  return null;
}

/** Widgets whose value comes through a wire are left out: only a run knows it. */
function valuesOf(node, names) {
  const isWired = (name) => node.inputs?.some((input) => input.widget?.name === name && input.link != null);
  const found = names.filter((name) => widget(node, name) && !isWired(name));
  return Object.fromEntries(found.map((name) => [name, widget(node, name).value]));
}
