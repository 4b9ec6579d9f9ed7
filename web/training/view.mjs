/**
 * How curves are looked at, the same in all panels of the page and kept in the browser: smoothing, logarithmic or not,
 * and which curves are drawn. Tells by an event "change".
 */

const KEPT = "LoRALoom.trainingView";
const DEFAULTS = { smoothing: 0.9, log: false, loss: true, validation: true, bands: false, rate: true };

class View extends EventTarget {
  values = { ...DEFAULTS };

  constructor() {
    super();
    try {
      const kept = JSON.parse(localStorage.getItem(KEPT)) ?? {};
      for (const [name, value] of Object.entries(DEFAULTS)) {
        if (typeof kept[name] === typeof value) this.values[name] = kept[name];
      }
    } catch {
      // nothing that can be read: as at first
    }
    this.values.smoothing = Math.min(0.999, Math.max(0, this.values.smoothing));
  }

  set(name, value) {
    this.values[name] = value;
    try {
      localStorage.setItem(KEPT, JSON.stringify(this.values));
    } catch {
      // a browser that keeps nothing
    }
    this.dispatchEvent(new Event("change"));
  }
}

export const view = new View();
