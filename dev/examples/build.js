/*
 * Builds one example in the host's own page and returns it as the page saves it:
 *
 * - makes the nodes, sets widgets and links by name; an unknown name is an error;
 * - places them in columns, columns in groups, with room for the larger of the canvas's own height and the one in
 *   `heights`, which is what nodes drawn by Vue need: {name: height} of `measure`.
 */
window.loomExamples = {
  gap: 60,
  titleHeight: 30,

  build(plan, heights) {
    const graph = app.graph;
    graph.clear();
    const made = new Map();
    for (const { name, type, title } of plan.nodes) {
      const node = LiteGraph.createNode(type);
      if (!node) throw new Error(`${name}: no node type ${type}`);
      graph.add(node);
      if (title) node.title = title;
      node.properties.cnr_id = type.startsWith("Loom") ? "lora-loom" : "comfy-core";
      made.set(name, node);
    }
    for (const { name, widgets } of plan.nodes) this.fill(made.get(name), widgets);
    for (const { name, links } of plan.nodes) {
      for (const [socket, [from, output]] of Object.entries(links)) this.join(made, name, socket, from, output);
    }
    this.place(plan, made, heights);
    return JSON.stringify(graph.serialize());
  },

  fill(node, widgets) {
    for (const [name, value] of Object.entries(widgets)) {
      const widget = node.widgets?.find((one) => one.name === name);
      if (!widget) throw new Error(`${node.type}: no widget ${name}`);
      widget.value = value;
    }
  },

  join(made, name, socket, from, output) {
    const [origin, target] = [made.get(from), made.get(name)];
    const out = origin?.outputs.findIndex((one) => (one.label ?? one.name) === output || one.name === output) ?? -1;
    const into = target.inputs.findIndex((one) => one.name === socket);
    if (out < 0 || into < 0) throw new Error(`${from}.${output} → ${name}.${socket}: no such socket`);
    if (!origin["connect"](out, target, into)) throw new Error(`${from}.${output} → ${name}.${socket}: refused`);
  },

  place(plan, made, heights) {
    const wanted = new Map(plan.nodes.map((one) => [one.name, one.size]));
    let x = 20;
    for (const { title, columns } of plan.groups) {
      const left = x - 20;
      let bottom = 0;
      for (const column of columns) {
        let [y, widest] = [40, 0];
        for (const name of column) {
          const node = made.get(name);
          const least = node.computeSize();
          const [width, height] = wanted.get(name);
          const own = Math.ceil(Math.max(least[1], height) / 10) * 10;
          node.setSize([Math.max(width, Math.min(least[0], 400)), own]);
          node.pos = [x, y];
          y += Math.max(own, Math.ceil((heights[name] ?? 0) / 10) * 10) + this.gap;
          widest = Math.max(widest, node.size[0]);
        }
        bottom = Math.max(bottom, y - this.gap);
        x += widest + 40;
      }
      const frame = new LiteGraph.LGraphGroup(title);
      frame.pos = [left, -40];
      frame.size = [x - left - 20, bottom + 60];
      app.graph.add(frame);
      x += 20;
    }
    const frames = app.graph._groups;
    const tallest = Math.max(...frames.map((frame) => frame.size[1]));
    for (const frame of frames) frame.size = [frame.size[0], tallest];
  },

  measure(plan) {
    const byId = new Map(app.graph._nodes.map((node, index) => [String(node.id), plan.nodes[index].name]));
    const found = {};
    for (const element of document.querySelectorAll("[data-node-id]")) {
      const name = byId.get(element.dataset.nodeId);
      if (name) found[name] = element.offsetHeight - this.titleHeight;
    }
    return found;
  },
};
