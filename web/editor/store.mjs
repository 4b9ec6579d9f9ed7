/**
 * The dataset that is open in the editor's window: what is known of it, what is chosen, what can be done.
 *
 * Everything the page shows is read from here and everything it does goes through here; panels listen to the events.
 *
 * - reading promises (`tags`, `selected`, `detail`, `findings`, `idsOfFilter`, `program`, `preview`, `complete`)
 *   reject with an Error whose message can be shown; a question that was overtaken gets the answer to the newer one
 * - actions (`open`, `attach`, `edit`, `undo`, `redo`, `focus`, `write`, `close`) never reject: they dispatch "failed"
 *   and resolve to null; they take their turns
 * - edits of a node's dataset are put into its program, so that the workflow holds them
 * - a server that was started anew has forgotten the dataset: it is opened again, and that is said
 *
 * Events: "state" (`state` changed; detail: {changed: [ids] or null for anything}), "rows" (rows, total, filter or
 * badges changed), "selection", "cursor", "failed" (detail: an Error to be shown), "said" (detail: {text, level: "ok",
 * "info" or "warn", action?: {text, do}}).
 */

import { Answers } from "./answers.mjs";
import { Turns } from "./asking.mjs";
import { Connection } from "./connection.mjs";
import { Pages } from "./pages.mjs";
import { badges, ofEdit, ofReopening, ofWriting, shortened } from "./reporting.mjs";

const STATE = ["revision", "unsaved", "edits", "can_undo", "can_redo", "undo", "redo", "keeps"];
const PROGRAM_WAIT = 150; // milliseconds, so that a series of edits asks once

export class Store extends EventTarget {
  /** The dataset's summary, or null: {id, name, images, revision, unsaved, edits, can_undo, can_redo, undo, redo,
   *  keeps, concepts, notes}. */
  state = null;
  /** The text of the filter, and what is wrong with it ("" where nothing is). */
  filter = "";
  filterError = "";
  onlyChanged = false;
  /** Ids of the selected images; change it by `select` alone. */
  selection = new Set();
  /** The id of the image that panels show and keys start from, or null. */
  cursor = null;

  #server = new Connection((state) => this.#reopened(state));
  #setProgram = null;
  #programTimer = 0;
  #turns = new Turns();
  #answers = new Answers(this.#server, () => [this.state?.id, this.state?.revision]);
  #checked = null; // the findings that badges are of
  #badges = new Map(); // by id: {count, level}
  #pages = new Pages(
    (start, count, signal) => this.#loadRows(start, count, signal),
    () => this.#emit("rows"),
    (error) => this.#rowsFailed(error),
  );

  // -- what is known

  /** Images that the filter selects. */
  get total() {
    return this.#pages.total;
  }

  /** The row at that place of the filter, perhaps of before the last edit; undefined while its page is fetched. */
  row(index) {
    return this.#pages.at(index);
  }

  /** The row of an image, where it has been fetched. */
  rowOf(id) {
    return this.#pages.byId(id);
  }

  /** Where an image is in the filter, among the rows that have been fetched; else -1. */
  indexOf(id) {
    return this.#pages.indexOf(id);
  }

  /** Where an image is in the filter; -1 where it is not in it. */
  async placeOf(id) {
    const index = this.indexOf(id);
    return index >= 0 ? index : (await this.idsOfFilter()).indexOf(id);
  }

  /** The id at that place of the filter. */
  async idAt(index) {
    return this.row(index)?.id ?? (await this.idsOfFilter())[index] ?? null;
  }

  /** What the last check found on an image: {count, level}, or null. */
  badge(id) {
    return this.#badges.get(id) ?? null;
  }

  /** All ids of the present filter, in their order. */
  idsOfFilter() {
    return this.#answers.ids(this.#filtered());
  }

  /** [[tag, count], …], the most frequent first. */
  tags() {
    return this.#answers.tags();
  }

  /** What the selection has in common, or else the cursor's image: {images, common, partial: [[tag, count]]}. */
  selected() {
    return this.#answers.selected(() => (this.selection.size ? [...this.selection] : this.cursor ? [this.cursor] : []));
  }

  /** All there is to say of an image: a row with before, shown, crops, cures. */
  detail(id) {
    return this.#answers.detail(id);
  }

  /** What the check finds: [{rule, title, level, message, cure, line, concept, images, details}, …]. Takes seconds. */
  async findings() {
    const found = await this.#answers.findings();
    if (found !== this.#checked) {
      [this.#checked, this.#badges] = [found, badges(found)];
      this.#emit("rows");
    }
    return found;
  }

  /** {given, added, program}: what a node was opened with, the editor's lines, both. */
  program() {
    return this.#answers.program();
  }

  /** What a line would do: {count, selected, notes, examples: [{image, before, after}], line}. */
  preview(line, images = null) {
    return this.#answers.preview(named({ line }, images));
  }

  /** Tags with a text in them: {text, dataset: [[tag, count]], lists: [{tag, count, category, alias}], notes}. */
  complete(text, most = 20) {
    return this.#answers.complete(text, most);
  }

  // -- what is chosen

  /** Resolves when the first rows are there. */
  setFilter(text) {
    this.filter = text.trim();
    return this.#refilter();
  }

  setOnlyChanged(on) {
    this.onlyChanged = Boolean(on);
    return this.#refilter();
  }

  /** `how`: "only" these ids, or "add", "remove", "toggle" them. */
  select(ids, how = "only") {
    const chosen = how === "only" ? new Set() : new Set(this.selection);
    for (const id of ids) {
      if (how === "remove" || (how === "toggle" && chosen.has(id))) chosen.delete(id);
      else chosen.add(id);
    }
    this.selection = chosen;
    this.#emit("selection");
  }

  setCursor(id) {
    if (id === this.cursor) return;
    this.cursor = id;
    this.#emit("cursor");
  }

  // -- what is done

  /**
   * Open {root, folder, resolution?, bucket_step?, trigger?} or {node, program, implications?}, both with `again`.
   * `setProgram(text)` is called with a node's program after every edit.
   */
  open(body, setProgram = null) {
    return this.#entered(() => this.#server.open(body), setProgram);
  }

  /** Open what the server has open already, by its id. */
  attach(id) {
    return this.#entered(() => this.#server.attach(id), null);
  }

  /** Do a line of the edit program, for some images or for those the line says. {changed, selected, notes, line, …} */
  edit(line, images = null) {
    return this.#act("operation", named({ line }, images), (answer) => {
      const undo = answer.changed.length ? { text: "Undo", do: () => this.undo() } : undefined;
      this.#say(ofEdit(answer), undo ? "ok" : "warn", undo);
    });
  }

  /** Lay the crop of an image around a box (left, top, right, bottom from 0 to 1), or around none. */
  focus(image, box) {
    return this.#act("focus", { image, box });
  }

  undo() {
    return this.#act("undo", {}, (answer) => this.#say(`undone: ${shortened(answer.line)}`, "info"));
  }

  redo() {
    return this.#act("redo", {}, (answer) => this.#say(`done again: ${shortened(answer.line)}`, "info"));
  }

  /**
   * Write captions into their files: {written, files, backups, refused: [{images, reason}]}, also where some were
   * refused ("failed" says why). With `dryRun` nothing is written: {files, images, refused}.
   */
  write({ images = null, dryRun = false } = {}) {
    const body = named(dryRun ? { dry_run: true } : {}, images);
    if (dryRun) return this.#turns.take(() => this.#server.post("write", body)).catch((error) => this.#fail(error));
    return this.#act("write", body, (answer) => this.#say(ofWriting(answer), "ok"), (error) => {
      this.#fail(error);
      return error.body?.written ? this.#did(error.body) : null;
    });
  }

  /** Resolves when all that was begun has ended, so that `state` is of now. */
  settled() {
    return this.#turns.take(() => {});
  }

  /** Leave the dataset; with `discard` the server forgets it too, with its edits. */
  async close({ discard = false } = {}) {
    await this.#turns.take(() => this.#tellProgram());
    if (discard) await this.#turns.take(() => this.#server.post("close")).catch((error) => this.#fail(error));
    this.#server.leave();
    this.#pages.forget();
    [this.state, this.#setProgram] = [null, null];
    this.#badges = new Map();
    this.select([]);
    this.setCursor(null);
    this.#emit("state", { changed: null });
  }

  // -- how

  #filtered() {
    return { filter: this.filter, changed: this.onlyChanged ? 1 : undefined };
  }

  #entered(call, setProgram) {
    return this.#turns.take(async () => {
      try {
        const state = await call();
        this.#setProgram = setProgram;
        [this.filter, this.filterError, this.onlyChanged] = ["", "", false];
        this.#badges = new Map();
        this.#opened(state);
        this.select([]);
        this.setCursor(null);
        return state;
      } catch (error) {
        return this.#fail(error);
      }
    });
  }

  #opened(state) {
    this.state = state;
    this.#pages.restart();
    this.#emit("state", { changed: null });
  }

  #reopened(state) {
    const lost = this.state;
    this.#opened(state);
    this.#say(ofReopening(lost), "warn");
  }

  #act(part, body, then = () => {}, otherwise = (error) => this.#fail(error)) {
    return this.#turns.take(async () => {
      try {
        const answer = this.#did(await this.#server.post(part, body));
        then(answer);
        return answer;
      } catch (error) {
        return otherwise(error);
      }
    });
  }

  /** Take over what an answer says of the state. */
  #did(answer) {
    const state = Object.fromEntries(STATE.filter((name) => name in answer).map((name) => [name, answer[name]]));
    this.state = { ...this.state, ...state };
    this.#pages.refresh();
    this.#emit("state", { changed: answer.changed ?? answer.written ?? null });
    this.#emit("rows");
    if (this.#setProgram) {
      clearTimeout(this.#programTimer);
      this.#programTimer = setTimeout(() => this.#turns.take(() => this.#tellProgram()), PROGRAM_WAIT);
    }
    return answer;
  }

  async #tellProgram() {
    clearTimeout(this.#programTimer);
    if (!this.#setProgram || !this.state) return;
    try {
      const { program } = await this.program();
      this.#server.hold(program);
      this.#setProgram?.(program);
    } catch (error) {
      this.#fail(error);
    }
  }

  async #loadRows(start, count, signal) {
    const answer = await this.#server.get("rows", { ...this.#filtered(), start, count }, signal);
    this.filterError = "";
    if (answer.revision !== this.state?.revision) this.#turns.take(() => this.#catchUp(answer.revision));
    return answer;
  }

  /** Somebody else may have edited it, in another page. */
  async #catchUp(revision) {
    if (!this.state || revision === this.state.revision) return;
    try {
      this.#did(await this.#server.get([]));
    } catch (error) {
      this.#fail(error);
    }
  }

  #rowsFailed(error) {
    if (error.status === 400 && this.filter) {
      this.filterError = error.message;
      this.#emit("rows");
    } else {
      this.#fail(error);
    }
  }

  async #refilter() {
    this.filterError = "";
    if (!this.state) return;
    this.#pages.restart();
    this.#emit("rows");
    if (!this.selection.size && !this.cursor) return;
    try {
      const ids = new Set(await this.idsOfFilter()); // nothing is edited unseen
      this.select([...this.selection].filter((id) => ids.has(id)));
      if (this.cursor && !ids.has(this.cursor)) this.setCursor(null);
    } catch (error) {
      if (error.status !== 400) this.#fail(error); // the rows say what is wrong with the filter
    }
  }

  #say(text, level, action) {
    this.#emit("said", { text, level, action });
  }

  #fail(error) {
    this.#emit("failed", error);
    return null;
  }

  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

const named = (body, images) => (images === null ? body : { ...body, images: [...images] });
