/**
 * Rows of a dataset, fetched by pages when they are looked at.
 *
 * - one request at a time, what was looked at last goes first; what is no longer looked at is not fetched
 * - after an edit (`refresh`) the rows that are there stay until the new ones arrive, so nothing flickers
 * - behind another filter (`restart`) the first page is fetched at once and replaces all others
 */

export const PAGE = 200; // rows
const MOST_WANTED = 4; // pages: who drags the scroll bar through thousands does not wait for all of them
const PAUSE = 3000; // milliseconds after a failure

export class Pages {
  #load;
  #changed;
  #failed;
  #pages = new Map();
  #places = new Map(); // by id
  #wanted = [];
  #generation = 0;
  #replace = true; // the next answer is of another filter
  #loading = false;
  #controller = new AbortController();
  #pausedUntil = 0;
  total = 0;

  /** `load(start, count, signal)` resolves to {rows, total}; `changed()` and `failed(error)` are called. */
  constructor(load, changed, failed) {
    [this.#load, this.#changed, this.#failed] = [load, changed, failed];
  }

  /** The row there, perhaps of before the last edit; undefined while it is fetched. */
  at(index) {
    if (index < 0 || index >= this.total) return undefined;
    const number = Math.floor(index / PAGE);
    const page = this.#pages.get(number);
    if (page?.generation !== this.#generation) this.#want(number);
    return page?.rows[index % PAGE];
  }

  /** Where the image of that id is, among the rows that have been fetched; -1 where it is none of them. */
  indexOf(id) {
    return this.#places.get(id) ?? -1;
  }

  byId(id) {
    const index = this.indexOf(id);
    return index < 0 ? undefined : this.#pages.get(Math.floor(index / PAGE))?.rows[index % PAGE];
  }

  refresh() {
    this.#generation++;
    this.#controller.abort();
    this.#pausedUntil = 0;
  }

  restart() {
    this.refresh();
    this.#replace = true;
    this.#wanted = [];
    this.#want(0);
  }

  forget() {
    this.refresh();
    this.#wanted = [];
    this.#clear();
    this.total = 0;
  }

  #clear() {
    this.#pages.clear();
    this.#places.clear();
  }

  #want(number) {
    if (Date.now() < this.#pausedUntil) return;
    this.#wanted = [...this.#wanted.filter((other) => other !== number), number].slice(-MOST_WANTED);
    if (!this.#loading) this.#fetch();
  }

  async #fetch() {
    this.#loading = true;
    while (this.#wanted.length) {
      const [number, generation] = [this.#wanted.at(-1), this.#generation];
      this.#controller = new AbortController();
      try {
        const { rows, total } = await this.#load(number * PAGE, PAGE, this.#controller.signal);
        if (generation !== this.#generation) continue; // of before an edit, or of another filter
        this.#wanted = this.#wanted.filter((other) => other !== number);
        this.#put(number, generation, rows, total);
        this.#changed();
      } catch (error) {
        if (generation !== this.#generation) continue;
        this.#wanted = [];
        this.#pausedUntil = Date.now() + PAUSE;
        setTimeout(this.#changed, PAUSE);
        this.#failed(error);
      }
    }
    this.#loading = false;
  }

  #put(number, generation, rows, total) {
    if (this.#replace) this.#clear();
    this.#replace = false;
    for (const { id } of this.#pages.get(number)?.rows ?? []) {
      if (Math.floor(this.indexOf(id) / PAGE) === number) this.#places.delete(id);
    }
    this.#pages.set(number, { generation, rows });
    rows.forEach(({ id }, index) => this.#places.set(id, number * PAGE + index));
    if (total < this.total) {
      for (const key of [...this.#pages.keys()]) if (key * PAGE >= total) this.#pages.delete(key);
    }
    this.total = total;
  }
}
