"""LoRA Loom: train LoRA adapters on the loaded model, inside the graph, and apply them in the same run."""

import importlib
import sys

WEB_DIRECTORY = "./web"

# The host loads a pack under its folder's path. It also answers to its own name, so that nothing is loaded twice.
_NAME = "lora_loom"
sys.modules.setdefault(_NAME, sys.modules[__name__])


async def comfy_entrypoint():
    """Called by the host; only now are the nodes, and ComfyUI with them, imported."""
    ours = list(sys.modules[_NAME].__path__) == list(__path__)
    nodes = importlib.import_module(".nodes", _NAME if ours else __name__)
    return nodes.Extension()
