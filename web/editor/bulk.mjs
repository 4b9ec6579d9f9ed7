/**
 * The panel of edits of many captions.
 *
 * - a form for each operation of the edit language, which writes a line; the line may be edited as text
 * - for all images, those of the filter, or the selected ones
 * - how many images would change is always shown first, with a few of them; then it can be applied
 */

import { FORMS } from "./bulk_forms.mjs";
import { addCompletion } from "./completion.mjs";
import { make, many, used } from "./dom.mjs";
import { separator } from "./images.mjs";
import { proposal } from "./proposal.mjs";
import { exactly } from "./quoting.mjs";

let number = 0;

export function bulkPanel(store) {
  const group = `loom-scope-${++number}`;
  let form = FORMS[0];
  let values = {};
  const operation = make("select", { className: "loom-field", "aria-label": "Operation" }, ...groups());
  const fields = make("div", { className: "loom-form" });
  const line = make("textarea", {
    className: "loom-text loom-code",
    rows: 2,
    spellcheck: "false",
    "aria-label": "Line of the edit program",
    title: "Ctrl+Enter applies it",
  });
  const suffix = make("code", { className: "loom-faint loom-suffix" });
  const scopes = Object.fromEntries(
    ["all", "filter", "selected"].map((scope) => [scope, scopeOf(group, scope, () => preview())]),
  );
  scopes.all.input.checked = true;
  const plan = proposal(store, { applied: () => preview() });
  const choices = Object.values(scopes).map((scope) => scope.element);
  const element = make(
    "div",
    { className: "loom-panel-body" },
    operation,
    fields,
    make("fieldset", { className: "loom-scopes" }, make("legend", {}, "For"), ...choices),
    make("h4", {}, "Line"),
    line,
    suffix,
    plan.element,
  );

  const write = () => {
    line.value = form.line(values, separator(store));
    preview();
  };

  const choose = () => {
    form = FORMS.find(({ id }) => id === operation.value);
    values = Object.fromEntries(form.fields.map((field) => [field.name, initial(field)]));
    fields.replaceChildren(...form.fields.map((field) => fieldOf(store, field, values, changed)));
    changed();
  };

  /** Fields that do not matter now are hidden. */
  const changed = () => {
    form.fields.forEach(({ only }, index) => (fields.children[index].hidden = only ? !only(values) : false));
    write();
  };

  const scope = () => Object.keys(scopes).find((each) => scopes[each].input.checked);

  const preview = () => {
    const [text, which] = [line.value.trim(), scope()];
    const [filter, selected] = [store.filter, [...store.selection]];
    const byIds = which === "selected" || (which === "filter" && store.onlyChanged);
    const count = which === "selected" ? selected.length : store.total;
    const where = which === "filter" && filter && !byIds ? `where ${filter}` : "";
    suffix.textContent = byIds && count ? `for these ${many(count, "image")}` : where;
    if (!text) plan.withdraw("Fill in the form, or write a line.");
    else if (byIds && !count) plan.withdraw("Select images first.");
    else if (which === "filter" && !byIds && !filter) plan.withdraw("Type a filter above the pictures first.");
    else if (byIds) plan.propose(text, which === "selected" ? selected : () => store.idsOfFilter());
    else plan.propose(where ? `${text} ${where}` : text);
  };

  operation.addEventListener("change", choose);
  line.addEventListener("input", () => {
    if (/[\r\n]/.test(line.value)) line.value = line.value.replace(/\s*[\r\n]+\s*/g, " "); // a line is one line
    preview();
  });
  line.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    if (event.ctrlKey || event.metaKey) plan.apply();
    used(event);
  });
  choose();

  let seen = "";
  const update = () => {
    const { state, filter, onlyChanged, selection, total } = store;
    scopes.all.tell(`all ${many(state.images, "image")}`);
    scopes.filter.tell(filter || onlyChanged ? `the filter (${many(total, "image")})` : "the filter (none is set)");
    scopes.selected.tell(`selected (${selection.size.toLocaleString("en")})`);
    const depends = { all: [], filter: [filter, onlyChanged], selected: [...selection] }[scope()];
    const now = JSON.stringify([state.id, state.revision, depends]);
    if (now !== seen) preview();
    seen = now;
  };
  /** Show the form of that id, to be filled in. */
  const start = (id) => {
    operation.value = id;
    choose();
    (fields.querySelector("input, textarea, select") ?? operation).focus();
  };
  return { id: "bulk", title: "Bulk", element, update, start };
}

function groups() {
  const names = [...new Set(FORMS.map(({ group }) => group))];
  return names.map((name) => {
    const forms = FORMS.filter(({ group }) => group === name);
    return make("optgroup", { label: name }, ...forms.map(({ id, title }) => make("option", { value: id }, title)));
  });
}

function scopeOf(group, scope, changed) {
  const input = make("input", { type: "radio", name: group, value: scope, onChange: changed });
  const text = make("span");
  const element = make("label", { className: "loom-choice" }, input, text);
  return { input, element, tell: (said) => (text.textContent = said) };
}

function initial({ kind, choices, value }) {
  if (kind === "check") return false;
  if (kind === "place") return { kind: "", value: "" };
  return kind === "choice" ? choices[0][0] : (value ?? "");
}

/** A field of a form; `values[name]` follows it and `changed` is called. */
function fieldOf(store, { name, kind, label, hint, choices, ...numbers }, values, changed) {
  const set = (value) => {
    values[name] = value;
    changed();
  };
  if (kind === "check") {
    const box = make("input", { type: "checkbox", onChange: () => set(box.checked) });
    return make("label", { className: "loom-choice loom-wide" }, box, label);
  }
  const control = {
    choice: () => select(choices, set),
    place: () => placeField(store, choices, values[name], changed),
    text: () => make("textarea", { rows: 1, spellcheck: "false" }),
    number: () => make("input", { type: "number", min: numbers.min, max: numbers.max, step: numbers.step }),
  }[kind]?.() ?? tagField(store, kind);
  if (["text", "number"].includes(kind)) control.value = values[name];
  if (!["choice", "place"].includes(kind)) control.addEventListener("input", () => set(control.value));
  const target = kind === "place" ? control.querySelector("select") : control;
  target.setAttribute("aria-label", label);
  control.classList.add("loom-field");
  const small = hint && make("small", { className: "loom-faint" }, hint);
  return make(
    "div",
    { className: "loom-form-row" },
    make("span", { className: "loom-form-label" }, label),
    make("div", { className: "loom-form-control" }, control, small),
  );
}

function select(choices, chosen) {
  const options = choices.map(([value, text]) => make("option", { value }, text));
  return make("select", { onChange: (event) => chosen(event.target.value) }, ...options);
}

/** Tags with completion: where they are looked for, a chosen one is written so that it means itself alone. */
function tagField(store, kind) {
  const input = make("input", { type: "text" });
  addCompletion(input, {
    complete: (text) => store.complete(text),
    separator: kind.endsWith("tags") ? () => separator(store) : undefined,
    written: kind.startsWith("new") ? undefined : exactly,
  });
  return input;
}

function placeField(store, choices, value, changed) {
  const input = tagField(store, "tag");
  input.className = "loom-field";
  input.hidden = true;
  input.setAttribute("aria-label", "Position or tag");
  input.addEventListener("input", () => {
    value.value = input.value;
    changed();
  });
  const kind = select(choices, (chosen) => {
    value.kind = chosen;
    input.hidden = !chosen || chosen === "start";
    input.placeholder = chosen === "position" ? "1 is the first" : "tag";
    changed();
  });
  kind.className = "loom-field";
  return make("div", { className: "loom-place" }, kind, input);
}
