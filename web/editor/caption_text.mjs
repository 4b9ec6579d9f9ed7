/**
 * A caption as text with its tags in it, for what a line about one tag cannot say: which of two equal ones is meant, or
 * a place among lines.
 *
 * - `spans(caption, tags)`: where each of the tags stands, which the server has told in order
 * - `without`, `withTag`, `reordered`: the caption after an edit; what stands between tags stays where it is
 * - `weightOf`: a tag written `(tag:1.2)` as the tag and its weight
 */

const WEIGHTED = /^\(+(.+):(\d{0,4}\.?\d{1,6})\)+$/;

export function spans(caption, tags) {
  let place = 0;
  return tags.map((tag) => {
    const start = caption.indexOf(tag, place);
    place = start + tag.length;
    return { start, end: place };
  });
}

export function without(caption, tags, index) {
  const all = spans(caption, tags);
  const { start, end } = all[index];
  const [before, behind] = [all[index - 1]?.end ?? 0, all[index + 1]?.start ?? caption.length];
  const lastOfLine = caption.slice(end, behind).includes("\n");
  const fromBefore = index > 0 && (index === all.length - 1 || lastOfLine);
  const alone = lastOfLine && caption.slice(before, start).includes("\n"); // then its line goes
  if (fromBefore && !alone) return caption.slice(0, before) + caption.slice(end);
  return caption.slice(0, start) + caption.slice(behind);
}

export function withTag(caption, tags, index, text) {
  const { start, end } = spans(caption, tags)[index];
  return caption.slice(0, start) + text + caption.slice(end);
}

export function reordered(caption, tags, from, to) {
  const order = [...tags];
  order.splice(to, 0, ...order.splice(from, 1));
  let [text, place] = ["", 0];
  for (const [index, { start, end }] of spans(caption, tags).entries()) {
    text += caption.slice(place, start) + order[index];
    place = end;
  }
  return text + caption.slice(place);
}

export function weightOf(tag) {
  const found = WEIGHTED.exec(tag);
  return found ? { text: found[1], weight: found[2] } : { text: tag, weight: null };
}
