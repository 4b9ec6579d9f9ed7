/**
 * The dataset nodes in the page.
 *
 * - a line on each node that checks datasets tells, after a run, what was found
 * - pictures, captions and folders dropped on a Dataset Loader go into a new folder under input, through the host's own
 *   upload route, which overwrites nothing; the node then reads that folder, and its line tells how far the upload is
 */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { filesOf, isDataset, isImage, itemsOf, plan } from "./dropped_files.mjs";
import { after } from "./graph.mjs";
import { addStatusLine } from "./status_line.mjs";
import { tell } from "./toasts.mjs";

const LOADER = "LoomDatasetLoader";
const HINTS = {
  [LOADER]: "drop images or a folder here",
  LoomDatasetFromImages: "checked when queued",
  LoomDatasetLint: "checked when queued",
};
const AT_ONCE = 4; // uploads under way
const PATIENCE = 15_000; // milliseconds until a new folder is listed; the server renews its list every few seconds

app.registerExtension({
  name: "LoRALoom.DatasetNodes",
  nodeCreated(node) {
    const hint = HINTS[node.comfyClass];
    if (!hint) return;
    const line = addVerdict(node, hint);
    if (node.comfyClass === LOADER) takeDrops(node, line);
  },
});

/** A line that shows the verdict of the latest run; `line.busy` keeps it for other news. */
function addVerdict(node, hint) {
  const line = { ...addStatusLine(node, "loom_status"), busy: false };
  line.show(hint, "hint");
  line.grow();
  after(node, "onConfigure", line.grow); // a workflow brings a size, perhaps of a time before the line
  after(node, "onExecuted", (output) => {
    const [text, level] = output?.loom_badge ?? [];
    if (text && !line.busy) line.show(text, level);
  });
  for (const widget of node.widgets) {
    after(widget, "callback", () => line.busy || line.show(hint, "hint")); // the verdict was on other settings
  }
  return line;
}

function takeDrops(node, line) {
  const receive = async (items) => {
    if (line.busy) return tell("warn", "An upload is still running", "Drop these files again when it has finished.");
    line.busy = true;
    try {
      const { folder, choices, images, left } = await upload(items, line.show);
      choose(node, folder, choices);
      const text = `${images} images in input/${folder}`;
      line.show(text, "ok");
      tell(left.length ? "warn" : "success", text, leftOut(left));
    } catch (error) {
      line.show(error.message, "error");
      tell("error", "The upload failed", error.message);
    } finally {
      line.busy = false;
    }
  };
  const drop = (event) => {
    const items = itemsOf(event.dataTransfer);
    if (!isDataset(items)) return false; // the page may open it
    receive(items);
    return true;
  };
  node.onDragOver = (event) => [...event.dataTransfer.items].some((item) => item.kind === "file");
  node.onDragDrop = drop;
  // on the canvas the line lies above its node, which hears nothing of what is dropped here
  line.element.addEventListener("dragover", (event) => event.preventDefault());
  line.element.addEventListener("drop", (event) => {
    if (!drop(event)) return;
    event.preventDefault();
    event.stopPropagation();
  });
}

async function upload(items, show) {
  const { folder, uploads, left } = plan(await filesOf(items), await listed());
  let sent = 0;
  const waiting = [...uploads];
  const send = async () => {
    while (waiting.length) {
      show(`uploading ${sent + 1} of ${uploads.length}`, "busy", sent / uploads.length);
      const next = waiting.shift();
      try {
        await sendOne(next);
      } catch (error) {
        waiting.length = 0; // the other senders stop after the file they are at
        throw new Error(`${next.name}: ${error.message}; ${sent} of ${uploads.length} files went to input/${folder}`);
      }
      sent++;
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, send));
  show(`waiting for the server to list ${folder}`, "busy", 1);
  const choices = await untilListed(folder);
  const images = uploads.filter(({ name }) => isImage(name)).length;
  return { folder, choices, images, left };
}

async function sendOne({ file, subfolder, name }) {
  const body = new FormData();
  body.append("image", file, name);
  body.append("type", "input");
  body.append("subfolder", subfolder);
  const answer = await api.fetchApi("/upload/image", { method: "POST", body });
  if (answer.status === 413) throw new Error("too large for the server, start it with a larger --max-upload-size");
  if (!answer.ok) throw new Error(`the server answered ${answer.status} ${answer.statusText}`);
  const stored = await answer.json();
  if (stored.name !== name) {
    throw new Error(`input/${subfolder} held another one, which was kept; rename the dropped folder or remove that one`);
  }
}

/** The folders that the server lists, of all roots. */
async function listed() {
  const answer = await api.fetchApi(`/object_info/${LOADER}`, { cache: "no-store" });
  const [kind, options] = (await answer.json())[LOADER].input.required.folder;
  return Array.isArray(kind) ? kind : options.options;
}

async function untilListed(folder) {
  for (const end = Date.now() + PATIENCE; Date.now() < end; ) {
    const choices = await listed();
    if (choices.includes(folder)) return choices;
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
  throw new Error(`the files are in input/${folder}, but the server finds no picture there that it can read`);
}

/** Let the node read that folder of input. */
function choose(node, folder, choices) {
  const widget = (of, name) => of.widgets.find((each) => each.name === name);
  const nodes = node.graph?.nodes ?? [node]; // no graph: the node was deleted meanwhile
  for (const loader of nodes.filter(({ comfyClass }) => comfyClass === LOADER)) {
    const { values } = widget(loader, "folder").options;
    values.splice(0, values.length, ...choices); // in place: nodes drawn by Vue keep to the list they saw first
  }
  for (const [name, value] of [["root", "input"], ["folder", folder]]) {
    widget(node, name).value = value;
    widget(node, name).callback?.(value);
  }
  app.canvas.setDirty(true, true);
}

function leftOut(names) {
  if (!names.length) return undefined;
  const some = names.slice(0, 5).join(", ") + (names.length > 5 ? ", …" : "");
  return `Left out, being hidden or neither pictures nor captions: ${names.length} (${some})`;
}
