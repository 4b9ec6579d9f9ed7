"""The example workflows in the host's real page: every node at its full size, in a group, and none upon another."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
LOAD = "(workflow) => app.loadGraphData(workflow)"
FRAMES = """() => app.graph._nodes.map((node) => {
    node.updateArea();
    return [node.title, [...node.boundingRect]];
})"""
GROUPS = "() => app.graph._groups.map(({ pos, size }) => [...pos, ...size])"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_lie_side_by_side_in_their_groups(host_page, path):
    host_page.evaluate("() => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
    host_page.evaluate(LOAD, json.loads(path.read_text()))
    host_page.wait_for_timeout(300)  # nodes that bring a line of their own grow by it
    frames, groups = host_page.evaluate(FRAMES), host_page.evaluate(GROUPS)
    assert len(frames) == len(json.loads(path.read_text())["nodes"])
    for (one, frame), (other, second) in combinations(frames, 2):
        assert not _overlap(frame, second), f"{one} and {other}"
    for title, frame in frames:
        assert any(_inside(frame, group) for group in groups), title


def _overlap(one, other):
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def _inside(frame, group):
    return all(
        group[axis] <= frame[axis] and frame[axis] + frame[axis + 2] <= group[axis] + group[axis + 2] for axis in (0, 1)
    )
