/**
 * Numbers of a training as people read them, and curves as a screen can show them. Pure functions.
 *
 * - smoothed: moving average with debiasing, as TensorBoard draws it
 * - decimated: of each column of pixels the first, lowest, highest and last point, so that no peak is lost
 * - ticks and logTicks for axes; numbers, durations, paces and bytes in few characters
 */

/** The average of each value and those before it, older ones by `weight` less each; what is no number stays so. */
export function smoothed(values, weight) {
  let [sum, left] = [0, 1];
  return values.map((value) => {
    if (!Number.isFinite(value) || weight <= 0) return value;
    sum = weight * sum + (1 - weight) * value;
    left *= weight;
    return sum / (1 - left);
  });
}

/** The first index at which `steps`, which rise, are at least `step`. */
export function indexOf(steps, step) {
  let [low, high] = [0, steps.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** The index of the point nearest to `step`; -1 where there is none. */
export function nearest(steps, step) {
  const after = indexOf(steps, step);
  if (after === steps.length) return after - 1;
  return after > 0 && step - steps[after - 1] <= steps[after] - step ? after - 1 : after;
}

/**
 * The indices of the points to draw between the steps `from` and `to` on `columns` of pixels, with one neighbour on
 * either side so that the line goes on past the edge.
 */
export function decimated(steps, values, from, to, columns) {
  const first = Math.max(0, indexOf(steps, from) - 1);
  const last = Math.min(steps.length, indexOf(steps, to + 1) + 1);
  const kept = [];
  if (last - first <= 4 * columns) {
    for (let index = first; index < last; index++) kept.push(index);
    return kept;
  }
  const perColumn = (to - from || 1) / columns;
  const columnOf = (index) => Math.floor((steps[index] - from) / perColumn);
  for (let index = first; index < last; ) {
    const column = columnOf(index);
    let [lowest, highest, end] = [-1, -1, index];
    for (; end < last && columnOf(end) === column; end++) {
      if (!Number.isFinite(values[end])) continue;
      if (lowest < 0 || values[end] < values[lowest]) lowest = end;
      if (highest < 0 || values[end] > values[highest]) highest = end;
    }
    const chosen = [index, lowest, highest, end - 1].filter((each) => each >= 0);
    for (const each of chosen.sort((one, other) => one - other)) if (kept.at(-1) !== each) kept.push(each);
    index = end;
  }
  return kept;
}

/** The values between which the share `inner` of all lies; [Infinity, -Infinity] where there are none. */
export function spread(values, inner = 1) {
  const sorted = Float64Array.from(values.filter(Number.isFinite)).sort();
  if (!sorted.length) return [Infinity, -Infinity];
  const cut = Math.floor((sorted.length * (1 - inner)) / 2);
  return [sorted[cut], sorted[sorted.length - 1 - cut]];
}

/** About `count` round numbers from `low` to `high`. */
export function ticks(low, high, count, whole = false) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = [1.5, 3.5, 7.5].findIndex((limit) => rough / power < limit);
  step = [1, 2, 5, 10].at(step) * power; // -1, the last, where it is beyond all
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let place = Math.ceil(low / step); place * step <= high + step * 1e-9; place++) found.push(place * step);
  return found;
}

/** Powers of ten from `low` to `high`, with their doubles and halves where there are few. */
export function logTicks(low, high) {
  const found = [];
  const decades = Math.log10(high / low);
  const factors = decades < 1 ? [1, 2, 3, 4, 5, 6, 7, 8, 9] : decades < 3 ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found;
}

/** A number in about `digits` digits. */
export function short(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) {
    return value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  }
  return String(Number(value.toPrecision(digits)));
}

/** A step with its thousands told apart. */
export function count(step) {
  return Number.isFinite(step) ? Math.round(step).toLocaleString("en-GB") : "–";
}

/** 75 → "1:15", 4000 → "1:06:40", 200000 → "2 d 7 h". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** From the seconds that a step takes. */
export function pace(seconds) {
  if (!(seconds > 0)) return "–";
  return seconds < 1 ? `${short(1 / seconds)} steps/s` : `${short(seconds)} s/step`;
}

/** Seconds since 1970. */
export const clock = () => Date.now() / 1000;

export function gigabytes(bytes) {
  const size = bytes / 2 ** 30;
  return size < 10 ? size.toFixed(1) : size.toFixed(0);
}

/** How long ago, in words; `seconds` since. */
export function ago(seconds) {
  if (!(seconds >= 60)) return "just now";
  for (const [length, name] of [[86400, "d"], [3600, "h"], [60, "min"]]) {
    if (seconds >= length) return `${Math.floor(seconds / length)} ${name} ago`;
  }
  return "";
}
