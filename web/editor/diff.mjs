/**
 * What changed between two captions.
 *
 * - `changes(before, after)`: parts that stay, go and come, word by word, separators for themselves
 * - `diffView`: both side by side with those words marked; they are told by a line through or under them too
 * - captions too long to compare word by word are marked from the first to the last difference
 */

import { make } from "./dom.mjs";

const PARTS = /[^\s,;.]+|\s+|[,;.]/g;
const MOST_CELLS = 1_000_000; // of the table that is filled to compare

/** [{kind: "same" | "gone" | "new", text}] in order. */
export function changes(before, after) {
  const [old, now] = [before.match(PARTS) ?? [], after.match(PARTS) ?? []];
  let start = 0;
  while (start < old.length && start < now.length && old[start] === now[start]) start++;
  let end = 0;
  const shorter = Math.min(old.length, now.length) - start;
  while (end < shorter && old[old.length - 1 - end] === now[now.length - 1 - end]) end++;
  const middle = compared(old.slice(start, old.length - end), now.slice(start, now.length - end));
  const same = (parts) => parts.map((text) => ({ kind: "same", text }));
  return joined([...same(old.slice(0, start)), ...middle, ...same(old.slice(old.length - end))]);
}

/** The longest common parts, by the usual table. */
function compared(old, now) {
  const all = (parts, kind) => parts.map((text) => ({ kind, text }));
  const isTooMuch = old.length * now.length > MOST_CELLS;
  if (!old.length || !now.length || isTooMuch) return [...all(old, "gone"), ...all(now, "new")];
  const width = now.length + 1;
  const lengths = new Uint32Array((old.length + 1) * width);
  for (let row = old.length - 1; row >= 0; row--) {
    for (let column = now.length - 1; column >= 0; column--) {
      lengths[row * width + column] =
        old[row] === now[column]
          ? lengths[(row + 1) * width + column + 1] + 1
          : Math.max(lengths[(row + 1) * width + column], lengths[row * width + column + 1]);
    }
  }
  const found = [];
  let [row, column] = [0, 0];
  while (row < old.length && column < now.length) {
    if (old[row] === now[column]) {
      found.push({ kind: "same", text: old[row] });
      row++;
      column++;
    } else if (lengths[(row + 1) * width + column] >= lengths[row * width + column + 1]) {
      found.push({ kind: "gone", text: old[row++] });
    } else {
      found.push({ kind: "new", text: now[column++] });
    }
  }
  return [...found, ...all(old.slice(row), "gone"), ...all(now.slice(column), "new")];
}

function joined(parts) {
  const found = [];
  for (const { kind, text } of parts) {
    if (found.at(-1)?.kind === kind) found.at(-1).text += text;
    else found.push({ kind, text });
  }
  return found;
}

/** Both captions side by side; `heads` are what stands above them. */
export function diffView(before, after, heads = ["before", "after"]) {
  const parts = changes(before, after);
  const side = (kind, tag, head) => {
    const own = parts.filter((part) => part.kind === "same" || part.kind === kind);
    const texts = own.map((part) => (part.kind === kind ? make(tag, {}, part.text) : part.text));
    const none = make("span", { className: "loom-faint" }, "no caption");
    return make(
      "div",
      { className: "loom-diff-side" },
      make("div", { className: "loom-diff-head" }, head),
      make("div", { className: "loom-diff-text" }, texts.length ? texts : none),
    );
  };
  return make("div", { className: "loom-diff" }, side("gone", "del", heads[0]), side("new", "ins", heads[1]));
}
