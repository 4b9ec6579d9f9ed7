/**
 * The panel of what becomes of the edits.
 *
 * - of a folder: how many captions are not in their files, and which, with what was there; a dry run that says what
 *   would be refused and why; writing; then where the older files lie, and what to do about what was refused
 * - of a node: the program, which lives in the workflow, and how many images it changes
 */

import { changedImages } from "./changed_images.mjs";
import { button, make, many } from "./dom.mjs";
import { showImages } from "./images.mjs";

const LIVES = "It lives in the node, and so in the workflow: it runs anew with it. Caption files stay as they are.";
const KEPT = "These edits are still here. To read the files anew, discard the edits on closing and open it again.";

export function writingPanel(store) {
  const [folder, node] = [folderPart(store), nodePart(store)];
  const element = make("div", { className: "loom-panel-body" }, folder.element, node.element);
  const isNode = () => store.state?.keeps === "program";
  return {
    id: "write",
    element,
    get title() {
      return isNode() ? "Program" : "Write";
    },
    update: () => {
      [folder.element.hidden, node.element.hidden] = [isNode(), !isNode()];
      return (isNode() ? node : folder).update();
    },
  };
}

function folderPart(store) {
  let dataset = null;
  const said = make("p", { className: "loom-verdict", role: "status", data: { loom: "unsaved" } });
  const what = "Say what would be written and what refused; nothing is written";
  const dry = button("Dry run", () => ask(true), { title: what });
  const write = button("Write", () => ask(false), { className: "primary", data: { loom: "write" } });
  const result = make("div", { className: "loom-result", role: "status", "aria-label": "Result" });
  const list = changedImages(store);
  const element = make(
    "div",
    { className: "loom-stack" },
    said,
    make("div", { className: "loom-row" }, write, dry),
    result,
    make("h4", {}, "Changed images"),
    list.element,
  );

  const enable = () => [dry, write].forEach((each) => (each.disabled = !store.state?.unsaved));

  const ask = async (dryRun) => {
    [dry.disabled, write.disabled] = [true, true];
    const answer = await store.write({ dryRun });
    if (answer) tell(answer, dryRun);
    enable();
  };

  const tell = ({ files, images, written, backups = [], refused = [] }, isDry) => {
    const verb = (count) => (isDry ? "would be" : count === 1 ? "was" : "were");
    const verdict = (level, text) => make("p", { className: "loom-verdict", data: { level } }, text);
    const count = isDry ? images : written.length;
    const left = refused.reduce((sum, each) => sum + each.images.length, 0);
    const into = `${many(count, "caption")} ${verb(count)} written into ${many(files, "file")}.`;
    result.replaceChildren(verdict(count ? "ok" : "warn", into));
    for (const backup of backups) result.append(make("p", {}, "What was there lies in ", make("code", {}, backup)));
    result.hidden = false;
    if (!left) return;
    result.append(verdict("error", `${many(left, "image")} ${verb(left)} refused:`));
    result.append(make("ul", { className: "loom-refused" }, ...refused.map(refusal)));
    if (!isDry) result.append(make("p", { className: "loom-faint" }, KEPT));
  };

  const refusal = ({ images, reason }) => {
    const face = `Show ${many(images.length, "image")}`;
    return make("li", {}, reason, button(face, () => showImages(store, images), { className: "small" }));
  };

  const update = () => {
    const { id, unsaved } = store.state;
    if (id !== dataset) result.hidden = true;
    dataset = id;
    const where = unsaved === 1 ? "its file" : "their files";
    said.textContent = unsaved ? `${many(unsaved, "caption")} not in ${where} yet` : "Every caption is in its file.";
    said.dataset.level = unsaved ? "warn" : "ok";
    write.textContent = unsaved ? `Write ${many(unsaved, "caption")}` : "Write";
    enable();
    return list.update();
  };
  return { element, update };
}

function nodePart(store) {
  let asked = 0;
  const said = make("p", { className: "loom-verdict", role: "status" });
  const text = make("textarea", {
    className: "loom-text loom-code",
    readonly: "",
    rows: 14,
    wrap: "off",
    spellcheck: "false",
    "aria-label": "Edit program",
  });
  const list = changedImages(store);
  const element = make(
    "div",
    { className: "loom-stack" },
    said,
    make("p", { className: "loom-faint" }, LIVES),
    text,
    make("h4", {}, "Changed images"),
    list.element,
  );

  const update = async () => {
    const number = ++asked;
    const { program } = await store.program();
    if (number !== asked) return;
    text.value = program;
    const count = many(store.state.unsaved, "image");
    said.textContent = program.trim() ? `The program changes ${count}.` : "The program is empty.";
    await list.update();
  };
  return { element, update };
}
