/**
 * Nodes of the graph as the server calls them.
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
