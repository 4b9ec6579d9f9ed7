"""Translations: English is what the nodes say, the others say all of it and keep what is no word."""

from __future__ import annotations

import re

import pytest

import locales

OTHERS = sorted(folder.name for folder in locales.LOCALES.iterdir() if folder.name != "en")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# what must be there in every language: options and files, numbers, tags, marks of a program
KEPT = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)+|\d+(?:\.\d+)?|<[^>]+>|(?<!\w)\.[a-z]{3,11}\b|\b[A-Z]{2,}\d*\b")
SPELT_OUT = {"AND", "OR", "NOT"}


def test_english_is_what_nodes_and_commands_say(server):
    """Else: python dev/locales.py"""
    assert locales.read("en") == locales.english(server.object_info())


def test_the_host_reads_them(server):
    told = server.get("/i18n")
    for language in ("en", *OTHERS):
        for file, texts in locales.read(language).items():
            part = texts if file == "main" else {file: texts}
            for path, text in locales.paths(part):
                found = told[language]
                for key in path:
                    found = found[key]
                assert found == text, (language, path)


def test_commands_and_settings_of_the_page_are_all_there():
    web = "".join(path.read_text(encoding="utf-8") for path in (locales.ROOT / "web").glob("*.js"))
    assert len(locales.command_texts()) == web.count('id: "LoRALoom.'), "a command that dev/locales.py does not see"
    assert "\n  settings: [" not in web, "settings need a settings.json"


@pytest.mark.parametrize("language", ["en", *OTHERS])
def test_no_text_is_a_message_with_marks(language):
    for path, text in locales.paths(locales.read(language)):
        assert not locales.MARKS.search(text), (path, text)
        assert text.strip() == text != "", path


@pytest.mark.parametrize("language", OTHERS or ["zh"])
def test_another_language_says_all_of_it(language):
    english, other = (dict(locales.paths(locales.read(name))) for name in ("en", language))
    assert set(other) == set(english), "python dev/locales.py --missing"
    for path, text in english.items():
        lost = sorted({token for token in KEPT.findall(text) if token not in other[path]} - SPELT_OUT)
        assert not lost, f"{'.'.join(path)}: {lost}"
        assert text.count("\n") == other[path].count("\n"), path
        for line, translated in zip(text.split("\n")[1:], other[path].split("\n")[1:], strict=True):
            choice = line.partition("  ")[0] if "  " in line else line.partition(": ")[0].partition(" and ")[0]
            assert translated.startswith(choice), f"{'.'.join(path)}: the choice {choice!r} is called so"


def test_chinese_is_chinese():
    for path, text in locales.paths(locales.read("zh")):
        if path[-1] != "name" and path != ("main", "nodeCategories", "LoRA Loom"):
            assert CHINESE.search(text), path
