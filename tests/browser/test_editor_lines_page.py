"""The lines that the editor's page writes: texts, patterns and filters mean what they mean to the edit program, and the
forms say every operation there is."""

from __future__ import annotations

import pytest

from lora_loom.training.dataset.edit_program import OPERATIONS, parse_operation
from lora_loom.training.dataset.edit_words import quoted
from lora_loom.training.dataset.filters import parse_filter
from lora_loom.training.dataset.fix_edits import FIXES
from lora_loom.training.dataset.tag_text import unescaped

NASTY = [
    *("", " ", "cat", 'a "quote"', "\\", "\\\\", "a\\", "\\n", "\n", "a\r\nb", '\\"', '"\\', "miku \\(vocaloid\\)"),
    *(r"\d+", "\\\n", "\\\r", "where", ", for", "#", "é 猫 🐈", "tab\there", "\u2028", "a*b?c", "\\*", "(x:1.2)"),
    "\ufeff",
    *('end\\"', "\\r\\n\\", "\\\\n", '\\\\"', "'single'", "\\n\n\\", "\x0b", "<b>&amp;</b>"),
]
FROM_MODULES = """async ([folder, texts, values]) => {
    const { exactly, quoted, tagFilter } = await import(`${folder}/quoting.mjs`);
    const { FORMS } = await import(`${folder}/bulk_forms.mjs`);
    const filled = (form, given) => {
        const special = { check: false, place: { kind: "", value: "" } };
        const initial = ({ kind, choices, value }) => special[kind] ?? choices?.[0][0] ?? value ?? "";
        return { ...Object.fromEntries(form.fields.map((field) => [field.name, initial(field)])), ...given };
    };
    const choices = (form) => form.fields.flatMap(({ name, kind, choices = [] }) =>
        choices.map(([value]) => ({ [name]: kind === "place" ? { kind: value, value: "3" } : value })));
    return {
        quoted: texts.map(quoted), exactly: texts.map(exactly), filters: texts.map(tagFilter),
        lines: FORMS.flatMap((form) => [{}, ...choices(form)].map((given) =>
            [form.id, form.line(filled(form, { ...values, ...given }), ",")])),
        empty: FORMS.map((form) => [form.id, form.line(filled(form, {}), ",")]),
    };
}"""
VALUES = {
    **{"tags": "red hat,, b\"c\\ ", "tag": "kitty", "to": "cat, animal", "trigger": "ohwx", "except": "a, b"},
    **{"old": r"(\w+) hat", "new": r"\1", "mark": " and ", "text": "a\nb", "lower": True, "again": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def modules(host_page, server):
    script = next(path for path in server.get("/extensions") if path.endswith("/dataset_nodes.js"))
    folder = script.replace("dataset_nodes.js", "editor")
    return host_page.evaluate(FROM_MODULES, [folder, NASTY, VALUES])


def test_texts_are_quoted_as_the_program_reads_them(modules):
    assert modules["quoted"] == [*map(quoted, NASTY)]
    for text, line in zip(NASTY, modules["quoted"], strict=True):
        assert parse_operation(f"set caption {line}").text == text


def test_patterns_and_filters_mean_one_tag_alone(modules):
    tags = [text for text in NASTY if text.strip() == text and text and "\n" not in text and "\r" not in text]
    for text, pattern, written in zip(NASTY, modules["exactly"], modules["filters"], strict=True):
        if text not in tags:
            continue
        [term] = parse_filter(written).terms()
        fitting = {other for other in tags if term.glob.fits(unescaped(other))}
        assert fitting == {other for other in tags if unescaped(other).lower() == unescaped(text).lower()}, written
        remove = parse_operation(f"remove {quoted(pattern)}")
        assert remove.tags == (pattern,)


def test_forms_write_every_operation_there_is(modules):
    written = [parse_operation(line) for _, line in modules["lines"] if line]
    assert {type(operation) for operation in written} == {*OPERATIONS}
    assert {operation.rule for operation in written if hasattr(operation, "rule")} == {*FIXES}
    lines = {form: line for form, line in reversed(modules["lines"])}
    assert lines["add"] == r'add "red hat", "b\"c\\" even if present'
    assert lines["rename"] == 'rename "kitty" to "cat", "animal"'
    assert lines["respell"] == 'respell with spaces in lower case except "a", "b"'
    assert ["add", r'add "red hat", "b\"c\\" at position 3 even if present'] in modules["lines"]
    assert ["move", r'move "red hat", "b\"c\\" after "3"'] in modules["lines"]
    empty = dict(modules["empty"])
    assert {form for form, line in empty.items() if not line} == {
        *("add", "remove", "rename", "move", "weight", "replace", "pattern", "split")
    }
    assert all(parse_operation(line) for line in empty.values() if line)


def test_the_page_saw_no_error_of_a_script(host_page):
    assert host_page.errors == []
