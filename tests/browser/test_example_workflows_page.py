"""The example workflows in the host's real page, drawn on the canvas and by Vue: every node at its full size, in a
group, and none upon another."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
VUE = "(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
ALL_IN_SIGHT = "() => { app.canvas.ds.scale = 0.05; app.canvas.ds.offset = [100, 100]; }"
LOAD = "(workflow) => app.loadGraphData(workflow)"
# the size of a node that the canvas draws is its own; Vue's is that of its element, which has the title inside
FRAMES = """(vue) => app.graph._nodes.map((node) => {
    node.updateArea();
    const element = document.querySelector(`[data-node-id="${node.id}"]`);
    const drawn = [node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, element?.offsetWidth, element?.offsetHeight];
    return [node.title, vue ? drawn : [...node.boundingRect]];
})"""
GROUPS = "() => app.graph._groups.map(({ pos, size }) => [...pos, ...size])"
DRAWN = "(count) => document.querySelectorAll('[data-node-id]').length === count"
STILL = """() => {
    const now = JSON.stringify(app.graph._nodes.map((node) => [...node.pos, ...node.size]));
    const same = window.loomFrames === now;
    window.loomFrames = now;
    return same;
}"""


@pytest.fixture(params=["canvas", "vue"])
def loaded(request, host_page):
    """load(workflow): opened on the canvas, and then, for Vue, drawn anew, as when a user switches."""

    def load(workflow):
        host_page.evaluate(VUE, False)
        host_page.evaluate(LOAD, workflow)
        if request.param == "vue":
            host_page.evaluate(ALL_IN_SIGHT)
            host_page.evaluate(VUE, True)
            host_page.wait_for_function(DRAWN, arg=len(workflow["nodes"]), timeout=30_000)
        host_page.wait_for_function(
            STILL, polling=400, timeout=30_000
        )  # nodes grow by lines that they bring themselves
        return host_page.evaluate(FRAMES, request.param == "vue"), host_page.evaluate(GROUPS)

    yield load
    host_page.evaluate(VUE, False)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_lie_side_by_side_in_their_groups(loaded, host_page, path):
    workflow = json.loads(path.read_text())
    frames, groups = loaded(workflow)
    assert len(frames) == len(workflow["nodes"])
    for (one, frame), (other, second) in combinations(frames, 2):
        assert not _overlap(frame, second), f"{one} and {other}"
    for title, frame in frames:
        assert any(_inside(frame, group) for group in groups), title
    for one, other in combinations(groups, 2):
        assert not _overlap(one, other), "groups"
    assert not host_page.get_by_text("Invalid workflow").count(), "not as the page saves it"


def test_the_page_saw_no_error_of_a_script(host_page):
    assert not host_page.errors


def _overlap(one, other):
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def _inside(frame, group):
    return all(
        group[axis] <= frame[axis] and frame[axis] + frame[axis + 2] <= group[axis] + group[axis + 2] for axis in (0, 1)
    )
