/**
 * The editor of captions in the page.
 *
 * - a button on each Tag Editor, whose program takes up the edits, and on each Dataset Loader, whose files are written
 * - a sidebar tab with all folders, what is open already and the Tag Editors that have run
 * - all of them open the same window, whose code is fetched when there is such a node, or then
 */

import { app } from "../../scripts/app.js";
import { bodyOf, OPENS, programOf } from "./editor/nodes.mjs";
import { showSidebar } from "./editor/sidebar.mjs";
import { tell } from "./toasts.mjs";

const BUTTON = "Open editor"; // its name, as nodes drawn by Vue show it
const PAUSE = 2000; // milliseconds

app.registerExtension({
  name: "LoRALoom.TagEditor",
  commands: [
    {
      id: "LoRALoom.OpenEditor",
      label: "Edit captions (LoRA Loom)",
      icon: "pi pi-tags",
      function: () => openFirst(Object.values(app.canvas.selected_nodes ?? {})),
    },
  ],
  setup() {
    app.extensionManager.registerSidebarTab({
      id: "lora-loom-captions",
      icon: "pi pi-tags",
      title: "Captions",
      tooltip: "Captions of your datasets (LoRA Loom)",
      type: "custom",
      render: (element) => showSidebar(element, open),
    });
  },
  nodeCreated(node) {
    if (!OPENS.includes(node.comfyClass)) return;
    fetchSoon();
    const widget = node.addWidget("button", BUTTON, "", () => openOf(node));
    widget.serialize = false;
    widget.options.serialize = false; // nor in the prompt
  },
});

function openFirst(nodes) {
  const node = nodes.find(({ comfyClass }) => OPENS.includes(comfyClass));
  if (node) openOf(node);
  else tell("info", "Select a Tag Editor or a Dataset Loader first", "Or choose a folder in the sidebar.");
}

function openOf(node) {
  return open({ body: bodyOf(node), setProgram: programOf(node) });
}

const load = () => import("./editor/window.mjs");

let fetching = 0;

/** Fetch the window's code once the page has nothing else to do, so that it opens at once. */
function fetchSoon() {
  fetching ||= setTimeout(() => load().catch(() => {}), PAUSE); // whoever opens it is told what is wrong
}

async function open(what) {
  try {
    const { openEditor } = await load();
    await openEditor(what);
  } catch (error) {
    tell("error", "The editor could not be opened", error.message);
  }
}
