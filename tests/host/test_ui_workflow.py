"""Workflows as the page saves them become prompts as the page would send them."""

import pytest

from ui_workflow import to_prompt

OBJECT_INFO = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0}],
                "cfg": ["FLOAT", {"default": 8.0}],
                "scheduler": ["COMBO", {"options": ["x"]}],
            },
            "optional": {
                "text": ["STRING", {"forceInput": True}],
                "edits": ["PROGRAM", {}],
                "late": ["INT", {"default": 9}],
            },
        }
    },
}


def node(number, kind, values=(), inputs=(), outputs=("MODEL",), mode=0):
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "widgets_values": list(values),
        "inputs": list(inputs),
        "outputs": [{"type": name} for name in outputs],
    }


def socket(name, link=None, kind="MODEL", widget=False):
    return {"name": name, "type": kind, "link": link} | ({"widget": {"name": name}} if widget else {})


def convert(nodes, links=()):
    return to_prompt({"nodes": nodes, "links": [[*link, "MODEL"] for link in links]}, OBJECT_INFO)


def test_values_are_placed_by_position_and_links_win():
    sample = node(
        2,
        "Sample",
        [7, "randomize", 3.5, "x", "kept", 4],
        [socket("model", 1), socket("edits", None, "PROGRAM", widget=True), socket("cfg", 2, "FLOAT", widget=True)],
    )
    primitive = node(3, "PrimitiveNode", [1.25, "fixed"], outputs=("FLOAT",))
    prompt = convert([node(1, "Load", ["b"]), sample, primitive], [(1, 1, 0, 2, 0), (2, 3, 0, 2, 2)])
    assert prompt["1"]["inputs"] == {"name": "b"}
    assert prompt["2"]["inputs"] == {
        "model": ["1", 0],
        "seed": 7,
        "cfg": 1.25,
        "scheduler": "x",
        "edits": "kept",
        "late": 4,
    }
    assert set(prompt) == {"1", "2"}


def test_a_value_that_a_saved_workflow_lacks_is_the_default():
    assert convert([node(2, "Sample", [7, "fixed", 3.5, "x"])])["2"]["inputs"]["late"] == 9


def test_bypassed_nodes_and_reroutes_pass_on_and_muted_ones_end_the_link():
    load, end = node(1, "Load", ["a"]), node(4, "Sample", [1, "fixed", 1.0, "x"], [socket("model", 3)])
    reroute = node(3, "Reroute", inputs=[socket("", 2, "*")])
    links = [(1, 1, 0, 2, 0), (2, 2, 0, 3, 0), (3, 3, 0, 4, 0)]
    middle = {mode: node(2, "Sample", [1, "fixed", 1.0, "x"], [socket("model", 1)], mode=mode) for mode in (0, 2, 4)}
    assert convert([load, middle[0], reroute, end], links)["4"]["inputs"]["model"] == ["2", 0]
    assert convert([load, middle[4], reroute, end], links)["4"]["inputs"]["model"] == ["1", 0]
    assert "model" not in convert([load, middle[2], reroute, end], links)["4"]["inputs"]


def test_a_stale_workflow_is_an_error_that_names_the_node():
    with pytest.raises(ValueError, match=r"node 1 \(Load\): widget values \['extra'\]"):
        convert([node(1, "Load", ["a", "extra"])])
    with pytest.raises(ValueError, match="node 1: the server has no node type 'Gone'"):
        convert([node(1, "Gone")])
