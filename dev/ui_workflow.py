"""Turn a workflow as the page saves it into a prompt as the server's API takes it.

``to_prompt(workflow, object_info)`` follows the page's own rules: widget values are positional, in the order of the
node's inputs; a seed is followed by its "control after generate" value, an uploadable image by its button; links win
over widget values; muted nodes vanish, bypassed nodes and reroutes pass on the input of the same type.
"""

from __future__ import annotations

from typing import Any

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
PAGE_ONLY = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
MUTED, BYPASSED = 2, 4
UPLOADS = ("image_upload", "video_upload", "audio_upload")


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The API prompt of a UI ``workflow``; ValueError names the node that the server cannot place."""
    if workflow.get("definitions", {}).get("subgraphs"):
        raise ValueError("workflows with subgraphs are not supported: unpack them first")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}
    prompt = {}
    for number, node in nodes.items():
        if node["type"] in PAGE_ONLY or node.get("mode", 0) in (MUTED, BYPASSED):
            continue
        if node["type"] not in object_info:
            raise ValueError(f"node {number}: the server has no node type {node['type']!r}")
        inputs = _widget_values(node, object_info[node["type"]])
        for socket in node.get("inputs", ()):
            source = _source(socket.get("link"), nodes, links)
            if source is not None:
                inputs[socket["name"]] = source
        title = node.get("title", node["type"])
        prompt[str(number)] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _widget_values(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    """Values by input name, from the node's positional ``widgets_values``."""
    saved = node.get("widgets_values", [])
    if isinstance(saved, dict):
        return dict(saved)
    shown = {socket["widget"]["name"] for socket in node.get("inputs", ()) if "widget" in socket}
    rest = list(saved)
    values: dict[str, Any] = {}
    for section in ("required", "optional"):
        for name, spec in info["input"].get(section, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            is_widget = isinstance(kind, list) or kind in WIDGET_TYPES or name in shown
            if not is_widget or options.get("forceInput"):
                continue
            if rest:
                values[name] = rest.pop(0)
            elif "default" in options:
                values[name] = options["default"]
            if rest and options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
                rest.pop(0)
            if rest and any(options.get(upload) for upload in UPLOADS):
                rest.pop(0)
    if rest:
        raise ValueError(f"node {node['id']} ({node['type']}): widget values {rest} belong to no input of it")
    return values


def _source(link: int | None, nodes: dict[int, Any], links: dict[int, tuple[int, int]]) -> list | Any | None:
    """Where a link's value comes from: ["node", slot], a primitive's own value, or None when nothing is left of it."""
    if link is None:
        return None
    number, slot = links[link]
    node = nodes[number]
    if node["type"] == "PrimitiveNode":
        return node["widgets_values"][0]
    if node.get("mode", 0) == MUTED:
        return None
    if node["type"] == "Reroute" or node.get("mode", 0) == BYPASSED:
        wanted = node["outputs"][slot]["type"]
        passed = [socket for socket in node.get("inputs", ()) if node["type"] == "Reroute" or socket["type"] == wanted]
        return _source(passed[0].get("link"), nodes, links) if passed else None
    return [str(number), slot]
