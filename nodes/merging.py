"""Nodes that make one LoRA of several."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import tools
from ..host.pictures import as_image
from ..host.tooling import cut_of, files_state
from ..kernels.tools.finishing import AS_GIVEN, PRECISIONS
from ..kernels.tools.merge import MAJORITIES, METHODS
from .applying import preview
from .compat import build
from .sockets import CATEGORY, LORA_MODEL, explained, node_id

SOCKETS = 8
TOOLS = f"{CATEGORY}/tools"


def rank_input(default: int, tooltip: str, name: str = "rank", **details: Any) -> Any:
    return io.Int.Input(name, default=default, min=0, max=4096, tooltip=tooltip, **details)


def energy_input() -> Any:
    return build(
        io.Float.Input,
        "energy",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.001,
        round=False,
        tooltip="Each layer keeps the fewest ranks that hold this part of its change (of the squared norm): 0.99 loses "
        "a tenth of it in norm. 0: does not count. With rank, whichever keeps fewer counts.",
    )


def precision_input(default: str = AS_GIVEN) -> Any:
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default=default,
        tooltip=f"Of the numbers in the result.\n{explained(PRECISIONS)}",
    )


def results(report: str) -> list[Any]:
    return [
        LORA_MODEL.Output("result", display_name="lora", tooltip="For Save LoRA, a loader, or the next tool."),
        io.String.Output("report", display_name="report", tooltip=report),
        io.Image.Output(
            "picture", display_name="picture", tooltip="How much of each block's change is retained, as bars."
        ),
    ]


def shown(made: tools.Made) -> io.NodeOutput:
    return io.NodeOutput(made.lora, made.report, as_image(made.picture), ui=preview(made.picture))


class LoomMergeLoRA(io.ComfyNode):
    """LORA_MODELs and files → LORA_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomMergeLoRA",
            display_name="Merge LoRAs",
            category=TOOLS,
            description=(
                "Makes one LoRA of several, of any families and ranks, with strengths by text encoder and block baked "
                "in: exactly (concat), as the best approximation of the exact sum, or by TIES, DARE and pruning on the "
                "true changes of the weights."
            ),
            search_aliases=["merge lora", "combine lora", "svd merge", "ties", "dare", "concat lora", "lora sum"],
            inputs=[
                *(
                    LORA_MODEL.Input(f"lora_{number}", optional=True, tooltip="From Read LoRA, the trainer or a tool.")
                    for number in range(1, SOCKETS + 1)
                ),
                io.String.Input(
                    "strengths",
                    default="",
                    multiline=True,
                    tooltip="A line for each connected LoRA, in their order: 0.7, or 0.7:te=0.3, or "
                    "1:blocks=in=0.5;double.3-8=0, all that a prompt's tag may say behind the name as long as it does "
                    "not change over the run. Empty: 1 for all.",
                ),
                io.String.Input(
                    "files",
                    default="",
                    multiline=True,
                    tooltip="More LoRAs, by name, one a line: cat:0.7, or style/dog:0.5:te=0, or as tags: "
                    "<lora:cat:0.7>. Names are found as in prompts.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="concat",
                    tooltip=f"How they become one.\n{explained(METHODS)}",
                ),
                rank_input(0, "Of each layer of the result, for all methods but concat. 0: does not count."),
                energy_input(),
                io.Float.Input(
                    "density",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="TIES, DARE, prune: the part of each LoRA's numbers that stays.",
                ),
                io.Combo.Input(
                    "majority",
                    options=list(MAJORITIES),
                    default="total",
                    tooltip=f"TIES: how signs are put to the vote.\n{explained(MAJORITIES)}",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="DARE: draws what is dropped.",
                ),
                precision_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="What they were made for. Needed for files whose layers are called differently, for block "
                    "weights, and for families that depend on the weights (DoRA, OFT, (IA)³).",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="With the MODEL, where they have parts on text encoders."
                ),
            ],
            outputs=results("What went in how strongly, what of it is retained by block, what had to be left out."),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, files: Any = None, **_: Any) -> str:
        """Changes with the files; runs before execute and on unchecked strings, so it never raises."""
        return files_state(files)

    @classmethod
    def execute(
        cls,
        strengths: str,
        files: str,
        method: str,
        rank: int,
        energy: float,
        density: float,
        majority: str,
        seed: int,
        precision: str,
        model: Any = None,
        clip: Any = None,
        **loras: Any,
    ) -> io.NodeOutput:
        sockets = [f"lora_{number}" for number in range(1, SOCKETS + 1)]
        given = [(socket, loras[socket]) for socket in sockets if loras.get(socket) is not None]
        options = tools.MergeOptions(method, density, majority, seed, precision)
        cut = cut_of(rank, energy)
        return shown(tools.merge_loras(given, strengths, files, options, cut, model, clip, node_id(cls)))


class LoomBakeApplied(io.ComfyNode):
    """MODEL and CLIP → LORA_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomBakeApplied",
            display_name="Applied LoRAs to One LoRA",
            category=TOOLS,
            description=(
                "Makes one LoRA of everything that is applied to a MODEL and a CLIP right now, whichever nodes did it: "
                "loaders of this pack and of others, merged models. What is of low rank stays exact."
            ),
            search_aliases=["bake lora", "export applied lora", "combine applied", "model to lora", "flatten lora"],
            inputs=[
                io.Model.Input("model", tooltip="Behind the nodes that applied something to it."),
                io.Clip.Input("clip", optional=True, tooltip="Likewise; without it text encoders are left out."),
                io.Combo.Input(
                    "method",
                    options=list(tools.BAKING),
                    default="concat",
                    tooltip=f"How they become one.\n{explained(tools.BAKING)}",
                ),
                rank_input(0, "Of each layer of the result, for sum. 0: does not count."),
                energy_input(),
                io.Int.Input(
                    "dense_rank",
                    default=tools.DENSE_RANK,
                    min=1,
                    max=4096,
                    tooltip="With concat, the rank of layers whose change is no product of two factors: DoRA, "
                    "rotations, merged models. The report states the error.",
                ),
                precision_input(),
            ],
            outputs=results("What was found, how exactly it is kept by block, and what could not be seen."),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        method: str,
        rank: int,
        energy: float,
        dense_rank: int,
        precision: str,
        clip: Any = None,
    ) -> io.NodeOutput:
        cut = cut_of(rank, energy)
        return shown(tools.bake_applied(model, clip, method, cut, dense_rank, precision, node_id(cls)))
