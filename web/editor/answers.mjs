/**
 * What the page asks about the open dataset, each question asked once while nothing changes.
 *
 * - answers are kept until the next revision; what was asked before a change is asked anew, nobody gets what is stale
 * - of previews, completions and what a selection has in common only the newest counts
 */

import { Kept, Latest } from "./asking.mjs";

const DETAILS = 64;

export class Answers {
  #server;
  #now;
  #ids = new Kept();
  #tags = new Kept();
  #findings = new Kept();
  #program = new Kept();
  #selected = new Kept();
  #selectedLatest = new Latest();
  #previews = new Latest();
  #completions = new Latest();
  #details = new Map(); // by revision and id

  /** `server` is a Connection, `now()` tells the dataset and its revision. */
  constructor(server, now) {
    [this.#server, this.#now] = [server, now];
  }

  ids(filtered) {
    const key = () => this.#key(filtered);
    return this.#ids.ask(key, async () => (await this.#server.get("ids", filtered)).ids);
  }

  tags() {
    return this.#tags.ask(() => this.#key(), async () => (await this.#server.get("tags")).tags);
  }

  findings() {
    return this.#findings.ask(() => this.#key(), async () => (await this.#server.get("findings")).findings);
  }

  program() {
    return this.#program.ask(() => this.#key(), () => this.#server.get("program"));
  }

  /** `idsOf()` are those that are selected when the question is asked. */
  selected(idsOf) {
    const ask = () => {
      const images = idsOf();
      if (!images.length) return Promise.resolve({ images: 0, common: [], partial: [] });
      return this.#selectedLatest.ask((signal) => this.#server.post("selection", { images }, signal));
    };
    return this.#selected.ask(() => this.#key(...idsOf()), ask);
  }

  detail(id) {
    const key = this.#key(id);
    const held = this.#details.get(key);
    if (held) return held;
    const answer = this.#server.get(["images", id]).catch((error) => {
      this.#details.delete(key);
      throw error;
    });
    this.#details.set(key, answer);
    while (this.#details.size > DETAILS) this.#details.delete(this.#details.keys().next().value);
    return answer;
  }

  preview(body) {
    return this.#previews.ask((signal) => this.#server.post("preview", body, signal));
  }

  complete(text, most) {
    const ask = async (signal) => ({ text, ...(await this.#server.complete({ q: text, most }, signal)) });
    return this.#completions.ask(ask);
  }

  #key(...more) {
    return JSON.stringify([...this.#now(), ...more]);
  }
}
