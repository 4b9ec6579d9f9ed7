/**
 * Answers that are overtaken.
 *
 * - `Latest`: of several questions of a kind only the newest counts; who asked before gets the newest answer too
 * - `Kept`: an answer is kept while its key stays the same, and asked for anew where the key changed meanwhile
 * - `Turns`: one after the other
 */

/** `ask(call)`: what the newest `call(signal)` resolves to; the requests of older ones are given up. */
export class Latest {
  #controller = new AbortController();
  #newest = null;

  ask(call) {
    this.#controller.abort();
    this.#controller = new AbortController();
    return (this.#newest = this.#answer(call, this.#controller));
  }

  async #answer(call, controller) {
    try {
      const answer = await call(controller.signal);
      return this.#controller === controller ? answer : this.#newest;
    } catch (error) {
      if (this.#controller !== controller) return this.#newest;
      throw error;
    }
  }
}

/** `ask(keyOf, call)`: what `call()` resolves to, asked once while `keyOf()` is the same; failures are not kept. */
export class Kept {
  #key = null;
  #answer = null;

  ask(keyOf, call) {
    const key = keyOf();
    if (this.#key === key) return this.#answer;
    const forget = () => {
      if (this.#answer === answer) this.#key = null;
    };
    const answer = call().then(
      (found) => (keyOf() === key ? found : this.ask(keyOf, call)),
      (error) => {
        forget();
        throw error;
      },
    );
    [this.#key, this.#answer] = [key, answer];
    return answer;
  }
}

/** `take(call)`: what `call()` resolves to, begun when everything taken before has ended. */
export class Turns {
  #last = Promise.resolve();

  take(call) {
    const mine = this.#last.then(call);
    this.#last = mine.catch(() => {}); // whoever asked hears of it
    return mine;
  }
}
