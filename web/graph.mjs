/**
 * Nodes of the graph: as the server calls them, and what is done to them.
 */

import { app } from "../../scripts/app.js";

/** The node that the server calls so: "7", or "3:7" inside the subgraph of node 3. */
export function nodeOf(id) {
  let [node, graph] = [null, app.rootGraph ?? app.graph];
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part);
    graph = node?.subgraph;
  }
  return node ?? null;
}

/** Let `then` run after the object's method of that name, with the same arguments. */
export function after(object, name, then) {
  if (!object) return;
  const before = object[name];
  object[name] = function (...args) {
    const result = before?.apply(this, args);
    then(...args);
    return result;
  };
}
