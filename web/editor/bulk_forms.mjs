/**
 * The operations of the edit language as forms: what each asks, and the line that says it.
 *
 * A field is {name, kind, label, …}. Kinds: "tag" and "tags" are looked for and may have * and ?, "new tag" and
 * "new tags" are written as they stand, "text", "number", "choice", "check", and "place" for where tags go; with `only`
 * it is shown where that says so. `line(values, separator)` returns the line, or "" while something is missing.
 */

import { listed, quoted, splitTags } from "./quoting.mjs";

const TAGS = { name: "tags", kind: "tags", label: "Tags", hint: "* any letters, ? one letter" };
const PLACES = [
  ["", "at the end"],
  ["start", "at the start"],
  ["position", "at position"],
  ["before", "before the tag"],
  ["after", "after the tag"],
];
const PLACE = { name: "place", kind: "place", label: "Where", choices: PLACES };
const FIXABLE = [
  ["T001", "captions that say nothing"],
  ["T002", "trigger not first"],
  ["T004", "outfit not second"],
  ["T020", "implied tags"],
  ["T021", "one tag, several spellings"],
  ["T023", "rare, perhaps misspelt"],
];

const choice = (name, label, ...choices) => ({ name, kind: "choice", label, choices });
const number = (name, label, value, min, max, step) => ({ name, kind: "number", label, value, min, max, step });
const tags = (text, separator) => listed(splitTags(text, separator));

/** `at position 3`, `before "x"`; null while something is missing. */
function place({ kind, value }, preposition) {
  if (!kind) return preposition === "to" ? "to end" : "";
  if (kind === "start") return `${preposition} start`;
  if (kind === "position") return /^[1-9]\d{0,5}$/.test(value) ? `${preposition} position ${value}` : null;
  return value.trim() ? `${kind} ${quoted(value.trim())}` : null;
}

const words = (...parts) => parts.filter(Boolean).join(" ");

export const FORMS = [
  {
    id: "add",
    group: "Tags",
    title: "Add tags",
    fields: [
      { name: "tags", kind: "new tags", label: "Tags" },
      PLACE,
      { name: "again", kind: "check", label: "even where it is present already" },
    ],
    line: (values, separator) => {
      const [list, where] = [tags(values.tags, separator), place(values.place, "at")];
      return list && where !== null ? words("add", list, where, values.again && "even if present") : "";
    },
  },
  {
    id: "remove",
    group: "Tags",
    title: "Remove tags",
    fields: [TAGS],
    line: (values, separator) => words("remove", tags(values.tags, separator)).replace(/^remove$/, ""),
  },
  {
    id: "rename",
    group: "Tags",
    title: "Rename a tag",
    fields: [
      { name: "tag", kind: "tag", label: "Tag", hint: "* any letters, ? one letter" },
      { name: "to", kind: "new tags", label: "To", hint: "one tag or several" },
    ],
    line: ({ tag, to }, separator) => {
      const list = tags(to, separator);
      return tag.trim() && list ? `rename ${quoted(tag.trim())} to ${list}` : "";
    },
  },
  { id: "remove duplicates", group: "Tags", title: "Remove duplicates", fields: [], line: () => "remove duplicates" },
  {
    id: "implied",
    group: "Tags",
    title: "Implied tags",
    fields: [choice("how", "Do", ["remove", "remove what other tags say already"], ["add", "add all that tags imply"])],
    line: ({ how }) => `${how} implied`,
  },
  {
    id: "move",
    group: "Order",
    title: "Move tags",
    fields: [TAGS, PLACE],
    line: (values, separator) => {
      const [list, where] = [tags(values.tags, separator), place(values.place, "to")];
      return list && where ? words("move", list, where) : "";
    },
  },
  {
    id: "sort",
    group: "Order",
    title: "Sort tags",
    fields: [
      choice("by", "By", ["frequency", "how frequent they are in the dataset"], ["name", "name"]),
      { ...number("fixed", "Keep first", "0", 0, 100000, 1), hint: "tags that stay in front" },
    ],
    line: ({ by, fixed }) => {
      if (!/^\d{1,6}$/.test(fixed)) return "";
      return words("sort by", by, Number(fixed) > 0 && `keeping first ${Number(fixed)}`);
    },
  },
  {
    id: "trigger",
    group: "Order",
    title: "Put trigger first",
    fields: [{ name: "trigger", kind: "new tag", label: "Trigger", hint: "empty: the dataset's own" }],
    line: ({ trigger }) => words("put trigger", trigger.trim() && quoted(trigger.trim()), "first"),
  },
  {
    id: "respell",
    group: "Spelling",
    title: "Underscores and capitals",
    fields: [
      choice("gaps", "Between words", ["spaces", "spaces"], ["underscores", "underscores"], ["", "as they are"]),
      { name: "lower", kind: "check", label: "in lower case" },
      { name: "except", kind: "tags", label: "Except", hint: "emoticons, triggers and score_9 stay anyway" },
    ],
    line: (values, separator) => {
      const except = tags(values.except, separator);
      const how = words(values.gaps && `with ${values.gaps}`, values.lower && "in lower case");
      return how && words("respell", how, except && `except ${except}`);
    },
  },
  {
    id: "weight",
    group: "Spelling",
    title: "Weights",
    fields: [
      choice("how", "Do", ["set", "set the weight"], ["clear", "clear the weight"]),
      { ...number("weight", "Weight", "1.1", 0, 10, 0.05), only: ({ how }) => how === "set" },
      TAGS,
    ],
    line: (values, separator) => {
      const list = tags(values.tags, separator);
      if (!list || (values.how === "set" && !/^\d{1,2}(\.\d{1,3})?$/.test(values.weight))) return "";
      return words(values.how, "weight", values.how === "set" && values.weight, "on", list);
    },
  },
  { id: "tidy", group: "Spelling", title: "Tidy up", fields: [], line: () => "tidy" },
  {
    id: "replace",
    group: "Text",
    title: "Find and replace",
    fields: [
      { name: "old", kind: "text", label: "Find", hint: "capitals matter" },
      { name: "new", kind: "text", label: "Replace with" },
    ],
    line: (values) => values.old && `replace text ${quoted(values.old)} with ${quoted(values.new)}`,
  },
  {
    id: "pattern",
    group: "Text",
    title: "Regular expression",
    fields: [
      { name: "old", kind: "text", label: "Pattern", hint: String.raw`e.g. (\w+) hair` },
      { name: "new", kind: "text", label: "Replace with", hint: String.raw`\1 is the first group` },
      choice("within", "In", ["tags", "each tag"], ["captions", "whole captions"]),
    ],
    line: ({ old, new: now, within }) => old && `replace pattern ${quoted(old)} with ${quoted(now)} in ${within}`,
  },
  {
    id: "split",
    group: "Text",
    title: "Split tags",
    fields: [{ name: "mark", kind: "text", label: "At", hint: "this text goes" }],
    line: ({ mark }) => mark && `split tags at ${quoted(mark)}`,
  },
  {
    id: "join",
    group: "Text",
    title: "Join tags",
    fields: [{ name: "joint", kind: "text", label: "With", value: " " }],
    line: ({ joint }) => `join tags with ${quoted(joint)}`,
  },
  { id: "lines", group: "Text", title: "Join lines", fields: [], line: () => "join lines" },
  {
    id: "caption",
    group: "Text",
    title: "Set the whole caption",
    fields: [{ name: "text", kind: "text", label: "Caption" }],
    line: ({ text }) => `set caption ${quoted(text)}`,
  },
  {
    id: "fix",
    group: "More",
    title: "Fix what the check finds",
    fields: [choice("rule", "Rule", ...FIXABLE.map(([rule, what]) => [rule, `${rule}: ${what}`]))],
    line: ({ rule }) => `fix ${rule}`,
  },
  {
    id: "focus",
    group: "More",
    title: "Focus of crops",
    fields: [
      choice("how", "Do", ["set", "set the box"], ["clear", "clear it"]),
      {
        name: "box",
        kind: "text",
        label: "Box",
        value: "0.25 0.1 0.75 0.6",
        hint: "left, top, right, bottom from 0 to 1",
        only: ({ how }) => how === "set",
      },
    ],
    line: ({ how, box }) => {
      const sides = box.trim().replace(/\s+/g, " ");
      return how === "clear" ? "clear focus" : sides && `set focus ${sides}`;
    },
  },
];
