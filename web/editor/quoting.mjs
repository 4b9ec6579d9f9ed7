/**
 * Texts as they stand in lines of an edit program and in filters.
 *
 * - `quoted`: a text in quotes, the one way that reads back exactly (training/dataset/edit_words.py writes it so too)
 * - `exactly`: the pattern that fits one tag alone, its * and ? taken as they are
 * - `tagFilter`: the filter that selects the images with a tag
 * - `splitTags`: what was typed into a field for several tags
 */

const SPECIAL = /[\n\r"]|\\(?=[nr"\\\n\r]|$)/g;
const ESCAPED = { "\n": "\\n", "\r": "\\r", '"': '\\"' };
const ESCAPED_BRACKET = /\\+([()])/g;
const WILD = /[*?\\]/g;

export const quoted = (text) => `"${text.replace(SPECIAL, (found) => ESCAPED[found] ?? "\\\\")}"`;

export const listed = (texts) => texts.map(quoted).join(", ");

/** The text with its brackets as they are meant: captions may have them escaped, which makes no other tag. */
export const unescaped = (text) => text.replace(ESCAPED_BRACKET, "$1");

export const exactly = (tag) => unescaped(tag).replace(WILD, "\\$&");

/** What makes two tags the same. */
export const nameOf = (tag) => unescaped(tag).trim().toLowerCase();

export const tagFilter = (tag) => `tag:"${exactly(tag).replace(/"/g, '\\"')}"`;

/** The tags of a text, without empty ones. */
export function splitTags(text, separator) {
  return text
    .split(separator)
    .map((tag) => tag.trim())
    .filter(Boolean);
}
