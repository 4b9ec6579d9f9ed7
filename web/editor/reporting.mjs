/**
 * What the editor says after something was done, and what the last check found on each image: pure functions.
 */

import { many } from "./dom.mjs";

const LONGEST_LINE = 100; // characters
const LEVELS = ["error", "warn", "info"]; // the gravest first

/** A line of an edit program, cut to what fits into a sentence. */
export function shortened(line) {
  return line.length > LONGEST_LINE ? `${line.slice(0, LONGEST_LINE)}…` : line;
}

export function ofEdit({ changed, notes }) {
  const text = changed.length ? `${many(changed.length, "image")} changed` : "nothing changed";
  return [text, ...notes].join("; ");
}

export function ofWriting({ written, files, backups }) {
  const where = backups.length ? `; as they were: ${backups.join(", ")}` : "";
  return `${many(written.length, "caption")} written into ${many(files, "file")}${where}`;
}

/** Of a dataset that the server had forgotten; `lost` is its state before. */
export function ofReopening(lost) {
  const count = lost.keeps === "files" ? lost.unsaved : 0;
  const what = count ? `: edits of ${many(count, "image")} that were not written are lost` : "";
  return `the server had closed this dataset, it is open again${what}`;
}

/** By image: {count, level}, the gravest level. */
export function badges(findings) {
  const found = new Map();
  for (const { level, images } of findings) {
    for (const id of images) {
      const { count, level: other } = found.get(id) ?? { count: 0, level };
      found.set(id, { count: count + 1, level: LEVELS.indexOf(level) < LEVELS.indexOf(other) ? level : other });
    }
  }
  return found;
}
