/**
 * The trainings that the page knows: those of the server, of nodes' outputs, and runs of before.
 *
 * - a training is {key, id, node, prompt, run, state, why, step, total, can, seq, …} as the server tells it, with its
 *   `curves`, `previews` and `wishes`; `loaded` once its curves are there
 * - events carry what is new; one that does not follow the last (`seq`) makes the page ask for what it has missed, as
 *   do a lost connection and a reload
 * - a training that a restarted server has forgotten goes on as the log of its run
 * - tells by events "list" (which there are, and their states) and "training" (`detail` is the key)
 */

import { api } from "../../../scripts/api.js";
import * as client from "./client.mjs";
import { addPoints } from "./curves.mjs";

export const EVENT = "lora_loom.training";
export const ENDED = ["done", "stopped", "failed", "lost", "past"];

export class Trainings extends EventTarget {
  #known = new Map();
  #refreshing = null;
  waiting = [];
  runs = [];

  /** Listen to the server, and learn what runs already. */
  start() {
    api.addEventListener(EVENT, ({ detail }) => this.#told(detail));
    api.addEventListener("reconnected", () => this.refresh(true));
    return this.refresh();
  }

  get(key) {
    return this.#known.get(key);
  }

  /** Those of this start of the server and of outputs, the oldest first. */
  all() {
    return [...this.#known.values()].filter(({ id }) => id).sort((one, other) => one.started - other.started);
  }

  /** Ask which trainings there are, and which wait; with `anew` also what was missed of those known. */
  refresh(anew = false) {
    this.#refreshing ??= this.#refresh(anew).finally(() => (this.#refreshing = null));
    return this.#refreshing;
  }

  async #refresh(anew) {
    const found = await client.trainings().catch(() => null); // no server: the page says so itself
    if (!found) return;
    this.waiting = found.waiting;
    const ids = new Set(found.trainings.map(({ id }) => id));
    for (const summary of found.trainings) {
      const known = this.#known.get(summary.id);
      if (!known) this.#add(summary);
      else if (known.loaded ? known.seq !== summary.seq : true) this.#missed(known, summary);
    }
    if (anew) for (const known of this.all()) if (!ids.has(known.id) && !known.lost) this.#lose(known);
    this.#emit("list");
  }

  /** Ask which runs of before there are. */
  async refreshRuns() {
    this.runs = await client.runs();
    this.#emit("list");
  }

  /** Have the curves of a training; those of a run folder by its name. */
  async load(key) {
    const known = this.#known.get(key);
    if (known && known.id && !known.loaded) await this.#fetch(known);
  }

  /** A run of before as a training that is over; resolves to its key. */
  async loadRun(name) {
    const { points, previews, step } = await client.run(name);
    const known = this.#add({ run: name, state: "past", step, can: [] }, `run:${name}`);
    known.curves = {};
    addPoints(known.curves, points);
    Object.assign(known, { previews, loaded: true });
    this.#changed(known);
    return known.key;
  }

  /** A node's output, which the host keeps with its cache and history; returns the training's key. */
  takeOutput(output) {
    if (!output?.id) return null;
    if (!this.#known.has(output.id)) {
      const known = this.#add(output);
      this.#take(known, output);
      known.loaded = true; // short curves, but all there may be
      this.#fetch(known, true);
      this.#emit("list");
    }
    return output.id;
  }

  /** Ask something of a training: "stop", "save", "preview", "pause" or "continue". */
  async ask(key, wish) {
    const known = this.#known.get(key);
    known.asking.add(wish);
    known.refusal = "";
    this.#changed(known);
    try {
      const left = await client.control(known.id, wish);
      if (!known.wishes.some(({ number }) => number === left.number)) known.wishes.push(left);
    } catch (error) {
      known.refusal = error.message;
    } finally {
      known.asking.delete(wish);
      this.#changed(known);
    }
  }

  // -- what comes in

  #told(news) {
    const known = this.#known.get(news.id);
    if (!known) {
      const added = this.#add(news);
      added.loaded = news.seq === 1; // from its beginning
      if (added.loaded) this.#take(added, news);
      this.#emit("list");
      this.#changed(added);
    } else if (known.fetching) {
      known.held.push(news);
    } else if (known.loaded && news.seq > known.seq + 1) {
      this.#fetch(known);
    } else if (news.seq > known.seq) {
      this.#news(known, news);
    }
  }

  #news(known, news) {
    const before = known.state;
    this.#take(known, news);
    if (before !== known.state) this.#emit("list");
    this.#changed(known);
  }

  #missed(known, summary) {
    if (known.loaded) this.#fetch(known);
    else this.#news(known, summary);
  }

  /** What the server knows of it beyond what is known here; with `kept` it may have forgotten it. */
  async #fetch(known, kept = false) {
    if (known.fetching) return known.fetching;
    const ask = async () => {
      const since = known.loaded && !kept ? known.step : undefined;
      try {
        const whole = await client.training(known.id, since);
        if (since === undefined) known.curves = {};
        this.#news(known, whole);
        known.loaded = true;
      } catch (error) {
        if (error.status !== 404) known.refusal = error.message;
        else if (kept) known.lost = true;
        else await this.#lose(known);
      }
    };
    known.fetching = ask().finally(() => {
      known.fetching = null;
      for (const news of known.held.splice(0)) this.#told(news);
      this.#changed(known);
    });
    return known.fetching;
  }

  /** The server was started anew: what the run's log tells is what there is. */
  async #lose(known) {
    known.lost = true;
    if (!ENDED.includes(known.state)) {
      const why = "the server was started anew meanwhile; queue the prompt again to go on with the run";
      Object.assign(known, { state: "lost", can: [], seconds_left: null, why });
    }
    try {
      const { points, previews } = await client.run(known.run);
      addPoints(known.curves, points);
      known.previews = previews;
    } catch {
      // no log: what was seen of it stays
    }
    known.loaded = true;
    this.#emit("list");
    this.#changed(known);
  }

  #add(summary, key = summary.id) {
    const empty = { curves: {}, previews: [], wishes: [], held: [], asking: new Set(), refusal: "", loaded: false };
    const known = { key, seq: 0, why: "", memory: {}, ...facts(summary), ...empty };
    this.#known.set(key, known);
    return known;
  }

  #take(known, news) {
    Object.assign(known, facts(news));
    addPoints(known.curves, news.points);
    known.previews = [...new Set([...known.previews, ...(news.previews ?? [])])].sort((one, other) => one - other);
    for (const wish of news.wishes ?? []) {
      const index = known.wishes.findIndex(({ number }) => number === wish.number);
      if (index < 0) known.wishes.push(wish);
      else known.wishes[index] = wish;
    }
  }

  #changed(known) {
    this.#emit("training", known.key);
  }

  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}

/** What the server tells of a training beside its curves. */
function facts({ points, previews, wishes, ...rest }) {
  return rest;
}
