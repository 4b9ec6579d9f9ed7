/**
 * The curves of a training in the page: {name: {step: […], value: […]}}, steps rising, NaN for what is no number.
 *
 * - points that are known already are left out, so that what was told twice stands there once
 * - at most LIMIT points each, however long the page stays open; the lowest and highest of each stretch remain
 */

import { decimated } from "./figures.mjs";

export const LIMIT = 20_000;
const COLUMNS = LIMIT / 8; // four points each: half the limit after thinning

/** Puts the server's `points` into `curves`. */
export function addPoints(curves, points = {}) {
  for (const [name, { step, value }] of Object.entries(points)) {
    const curve = (curves[name] ??= { step: [], value: [] });
    for (let index = 0; index < step.length; index++) {
      const last = curve.step.at(-1) ?? -1;
      if (step[index] < last) continue;
      if (step[index] === last) {
        curve.step.pop();
        curve.value.pop();
      }
      curve.step.push(step[index]);
      curve.value.push(value[index] ?? NaN);
    }
    if (curve.step.length > LIMIT) curves[name] = thinned(curve);
  }
}

function thinned({ step, value }) {
  const kept = decimated(step, value, step[0], step.at(-1), COLUMNS);
  return { step: kept.map((index) => step[index]), value: kept.map((index) => value[index]) };
}

/** What the last steps took on average, in seconds; NaN where none was made. */
export function secondsPerStep(curves, steps = 20) {
  const last = (curves.seconds?.value ?? []).slice(-steps).filter(Number.isFinite);
  return last.reduce((sum, each) => sum + each, 0) / last.length;
}

const start = (name) => Number.parseFloat(name.split(" ").at(-1));

/** The names of the curves of parts of the trajectory, clean first. */
export function bandsOf(curves) {
  const names = Object.keys(curves).filter((name) => name.startsWith("loss at "));
  return names.sort((one, other) => start(one) - start(other));
}

export const ratesOf = (curves) => Object.keys(curves).filter((name) => name.startsWith("learning_rate"));
