"""Nodes in the host's real page in another language: titles, categories and explanations are translated; what has no
translation is said as the node says it.

Older pages (1.32.9 is one) forget what packs translate as soon as they load a language other than English; there all is
said as the nodes say it.
"""

from __future__ import annotations

import pytest

import locales

KEEPS_TRANSLATIONS = (1, 49)
READY = "() => window.app?.vueAppReady && app.extensionManager && app.graph && app.canvas"
LANGUAGE = "(name) => app.extensionManager.setting.set('Comfy.Locale', name)"
NODE = """(type) => {
    const { title, nodeData } = LiteGraph.registered_node_types[type];
    return { title, category: nodeData.category, description: nodeData.description };
}"""
VERSION = "() => window.__COMFYUI_FRONTEND_VERSION__"
START_MILLISECONDS = 120_000


def keeps(page) -> bool:
    return tuple(int(part) for part in page.evaluate(VERSION).split(".")[:2]) >= KEEPS_TRANSLATIONS


@pytest.fixture(scope="module")
def chinese(host_page):
    host_page.evaluate(LANGUAGE, "zh")
    host_page.reload(wait_until="domcontentloaded")
    host_page.wait_for_function(READY, timeout=START_MILLISECONDS)
    yield host_page
    host_page.evaluate(LANGUAGE, "en")


@pytest.mark.parametrize("kind", ["LoomLoRATrainer", "LoomTagEditor", "LoomMergeLoRA"])
def test_a_node_is_shown_in_the_users_language(chinese, kind):
    told = locales.read("zh" if keeps(chinese) else "en")
    categories = told["main"]["nodeCategories"]
    shown = chinese.evaluate(NODE, kind)
    assert shown["title"] == told["nodeDefs"][kind]["display_name"]
    assert shown["description"] == told["nodeDefs"][kind]["description"]
    assert set(shown["category"].split("/")) <= set(categories.values())


def test_a_text_without_translation_is_the_nodes_own(chinese, server):
    own = server.object_info()["LoomPromptLoRA"]["description"]
    assert chinese.evaluate(NODE, "LoomPromptLoRA")["description"] == own


def test_the_page_saw_no_error_of_a_script(chinese):
    assert not chinese.errors
