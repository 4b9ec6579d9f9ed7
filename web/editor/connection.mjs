/**
 * The dataset of the editor's window, at the server.
 *
 * - `open(body)` or `attach(id)`, then `get(parts, query, signal)` and `post(part, body, signal)` about that dataset
 * - a server that was started anew has forgotten it: it is opened by the same body again, `reopened(state)` is called,
 *   and questions are asked once more; images keep their ids
 */

import { datasetPath, get, post, Refusal } from "./api.mjs";

export class Connection {
  #body = null;
  #id = null;
  #reopened;
  #reopening = null;

  constructor(reopened) {
    this.#reopened = reopened;
  }

  /** Rejects with a Refusal; the dataset that was open stays so. */
  async open(body) {
    const state = await post("/datasets", body);
    this.#body = { ...body, again: undefined };
    this.#id = state.id;
    return state;
  }

  /** A folder's dataset that the server has open. */
  async attach(id) {
    const state = await get(datasetPath(id));
    const [root, ...folder] = state.name.split("/");
    this.#body = { root, folder: folder.join("/") };
    this.#id = state.id;
    return state;
  }

  leave() {
    [this.#body, this.#id] = [null, null];
  }

  /** What a node's program is by now, for opening it again. */
  hold(program) {
    this.#body = { ...this.#body, program };
  }

  get(parts, query, signal) {
    return this.#asked((id) => get(datasetPath(id, ...[parts].flat()), query, signal));
  }

  post(part, body, signal) {
    return this.#asked((id) => post(datasetPath(id, part), body, signal));
  }

  complete(query, signal) {
    return this.#asked((id) => get("/completions", { ...query, dataset: id }, signal));
  }

  async #asked(call) {
    const id = this.#id;
    if (!id) throw new Refusal("no dataset is open");
    try {
      return await call(id);
    } catch (error) {
      if (error.status !== 404 || !(await this.#isAnother(id))) throw error;
      return call(this.#id);
    }
  }

  /** Whether the server had forgotten the dataset, and it is open again under another id. */
  async #isAnother(id) {
    if (id !== this.#id) return this.#id !== null;
    const isThere = await get(datasetPath(id)).then(
      () => true,
      (error) => error.status !== 404,
    );
    if (isThere) return false;
    if (id === this.#id) await (this.#reopening ??= this.#again());
    return this.#id !== null;
  }

  async #again() {
    try {
      const state = await this.open(this.#body);
      this.#reopened(state);
    } finally {
      this.#reopening = null;
    }
  }
}
