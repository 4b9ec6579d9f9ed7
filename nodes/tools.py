"""Nodes that make a LoRA of two models, change one, and look into one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..host import lora_cache, loras, saving, tools
from ..host.pictures import as_image
from ..host.tooling import cut_of
from ..kernels.low_rank import Cut
from ..kernels.tools.budget import Budget
from ..kernels.tools.finishing import written_in
from .applying import FROM_SOCKET, preview
from .compat import build
from .merging import TOOLS, energy_input, precision_input, rank_input, results, shown
from .sockets import LORA_MODEL, explained, node_id


def budget_inputs() -> list[Any]:
    return [
        io.Float.Input(
            "average_rank",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=0.5,
            tooltip="As many numbers as this rank would take, shared out among the layers so that most is retained. 0: "
            "does not count; goes without rank and energy.",
        ),
        io.Float.Input(
            "megabytes",
            default=0.0,
            min=0.0,
            max=100_000.0,
            step=0.5,
            tooltip="The same for a size of the file. 0: does not count.",
        ),
    ]


def amount(
    rank: int,
    energy: float,
    ratio: float,
    average_rank: float,
    megabytes: float,
    precision: str,
    given: Iterable[tuple[str, Tensor]] = (),
) -> Cut | Budget:
    """From widgets; ``given`` are the numbers whose precision is "as given". Raises ValueError naming the widgets."""
    cut = cut_of(rank, energy, ratio)
    budgets = [name for name, value in (("average_rank", average_rank), ("megabytes", megabytes)) if value]
    if cut is not None and budgets:
        raise ValueError(f"{budgets[0]}: goes without {' and '.join(_said(cut))}; set one or the other to 0")
    if len(budgets) == 2:
        raise ValueError("average_rank and megabytes both say how large it becomes; set one of them to 0")
    if budgets:
        itemsize = written_in(precision, given).itemsize
        if megabytes:
            return Budget.of_megabytes(megabytes, itemsize)
        return Budget(average_rank=average_rank, itemsize=itemsize)
    if cut is None:
        raise ValueError("rank: how large it becomes is not said; set rank, energy, average_rank or megabytes")
    return cut


def _said(cut: Cut) -> list[str]:
    return [name for name, value in vars(cut).items() if value is not None]


class LoomExtractLoRA(io.ComfyNode):
    """Two MODELs → LORA_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomExtractLoRA",
            display_name="Extract LoRA",
            category=TOOLS,
            description=(
                "Makes a LoRA of what one model has that another has not, layer by layer, with the error stated: of a "
                "fine-tuned checkpoint, a merge, or LoRAs that are applied. Biases and norms go in as they are."
            ),
            search_aliases=["extract lora", "model difference", "svd", "lora from checkpoint", "subtract models"],
            inputs=[
                io.Model.Input("model_tuned", tooltip="The model that has it."),
                io.Model.Input("model_base", tooltip="The model without it; the LoRA is for this one."),
                io.Clip.Input("clip_tuned", optional=True, tooltip="The text encoders of the one, with clip_base."),
                io.Clip.Input("clip_base", optional=True, tooltip="The text encoders of the other."),
                rank_input(32, "Of every layer, at most. 0: does not count."),
                energy_input(),
                *budget_inputs(),
                build(
                    io.Float.Input,
                    "min_change",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    round=False,
                    tooltip="Layers that change by less than this part of their weights' norm are left out. 0: all "
                    "that differ by more than rounding are in.",
                    advanced=True,
                ),
                build(
                    io.Float.Input,
                    "clamp_quantile",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="kohya's scripts limit the factors to the quantile 0.99 of their numbers, which costs "
                    "accuracy. 0: no limit.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "conv", default=True, tooltip="Convolutions with a kernel too. Off: linear layers and 1×1 alone."
                ),
                precision_input("float16"),
            ],
            outputs=results("How much of the difference is retained by block, and what was left out."),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model_tuned: Any,
        model_base: Any,
        rank: int,
        energy: float,
        average_rank: float,
        megabytes: float,
        min_change: float,
        clamp_quantile: float,
        conv: bool,
        precision: str,
        clip_tuned: Any = None,
        clip_base: Any = None,
    ) -> io.NodeOutput:
        cut = amount(rank, energy, 0.0, average_rank, megabytes, precision)
        return shown(
            tools.extract_lora(
                model_tuned,
                model_base,
                clip_tuned,
                clip_base,
                cut,
                min_change,
                clamp_quantile or None,
                conv,
                precision,
                node_id(cls),
            )
        )


class LoomResizeLoRA(io.ComfyNode):
    """LORA_MODEL → LORA_MODEL of another rank."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomResizeLoRA",
            display_name="Resize LoRA",
            category=TOOLS,
            description=(
                "Gives a LoRA fewer ranks: the best approximation of each layer, by rank, by retained energy, by the "
                "ratio of singular values, or for a size shared out among the layers. Other families become LoRA."
            ),
            search_aliases=["resize lora", "shrink lora", "reduce rank", "lora rank", "compress lora"],
            inputs=[
                LORA_MODEL.Input("lora", tooltip="From Read LoRA, the trainer or a tool."),
                rank_input(16, "Of every layer, at most. 0: does not count."),
                energy_input(),
                io.Float.Input(
                    "ratio",
                    default=0.0,
                    min=0.0,
                    max=1e6,
                    step=0.5,
                    tooltip="Keeps singular values that are at least the largest divided by this (kohya's sv_ratio). "
                    "0: does not count.",
                ),
                *budget_inputs(),
                precision_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="What it was made for: needed for families that depend on the weights; shows blocks.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="With the MODEL, where it has parts on text encoders."),
            ],
            outputs=results("Ranks before and after, and what is retained by block."),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        lora: Any,
        rank: int,
        energy: float,
        ratio: float,
        average_rank: float,
        megabytes: float,
        precision: str,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        cut = amount(rank, energy, ratio, average_rank, megabytes, precision, lora.items())
        return shown(tools.resize_lora(lora, cut, precision, model, clip, node_id(cls)))


class LoomConvertLoRA(io.ComfyNode):
    """LORA_MODEL → the same in other names, precision, or as plain LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomConvertLoRA",
            display_name="Convert LoRA",
            category=TOOLS,
            description=(
                "Writes a LoRA as other programs read it: in the names of kohya, LyCORIS, diffusers, PEFT or ComfyUI, "
                "in another precision, or any family (LoHa, LoKr, OFT, DoRA …) as plain LoRA with the error stated. "
                "Save the result with format: as it is."
            ),
            search_aliases=["convert lora", "lora to kohya", "lora to diffusers", "peft", "lycoris to lora", "fp16"],
            inputs=[
                LORA_MODEL.Input("lora", tooltip="From Read LoRA, the trainer or a tool."),
                io.Combo.Input(
                    "dialect",
                    options=list(saving.FORMATS),
                    default=saving.AS_IT_IS,
                    tooltip="What its layers are called. Others than its own need the MODEL.\n"
                    f"{explained(saving.FORMATS)}",
                ),
                precision_input(),
                io.Boolean.Input(
                    "plain",
                    default=False,
                    tooltip="Every layer as a LoRA, whatever its family: exactly where it is of low rank, else cut as "
                    "rank and energy say.",
                ),
                rank_input(0, "For plain, of layers that are of full rank. 0: does not count."),
                energy_input(),
                io.Model.Input("model", optional=True, tooltip="What it was made for."),
                io.Clip.Input("clip", optional=True, tooltip="With the MODEL, where it has parts on text encoders."),
            ],
            outputs=results("What was converted, with the error by block, and what a precision loses."),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        lora: Any,
        dialect: str,
        precision: str,
        plain: bool,
        rank: int,
        energy: float,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        cut = cut_of(rank, energy)
        return shown(tools.convert_lora(lora, dialect, precision, plain, cut, model, clip, node_id(cls)))


class LoomInspectLoRA(io.ComfyNode):
    """LORA_MODEL or file → what it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomInspectLoRA",
            display_name="Inspect LoRA",
            category=TOOLS,
            description=(
                "Tells what a LoRA is: family, ranks, base, trained parts, trigger words, how it was made, how much "
                "each block changes and how many of its ranks do something, and what is wrong with it, with advice."
            ),
            search_aliases=["lora info", "lora metadata", "lora rank", "check lora", "lora report", "trigger words"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=[FROM_SOCKET, *loras.sources()],
                    default=FROM_SOCKET,
                    tooltip="The file, or what a run keeps. Unused while the lora socket is connected.",
                ),
                LORA_MODEL.Input("lora", optional=True, tooltip="A LoRA from this graph."),
                io.Model.Input(
                    "model", optional=True, tooltip="Also tells which of its layers find no place on this model."
                ),
                io.Clip.Input("clip", optional=True, tooltip="With the MODEL, for parts on text encoders."),
            ],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="For people; also shown in the node."),
                io.String.Output("json", display_name="json", tooltip="All of it, for programs."),
                io.Image.Output(
                    "picture", display_name="picture", tooltip="The change and the effective rank of each block."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any = None, **_: Any) -> str:
        """Changes with the file; runs before execute and on unchecked strings, so it never raises."""
        return loras.state_of(lora_name)

    @classmethod
    def execute(cls, lora_name: str, lora: Any = None, model: Any = None, clip: Any = None) -> io.NodeOutput:
        if lora is None and lora_name == FROM_SOCKET:
            raise ValueError("lora_name: choose a file, or connect the lora socket")
        loaded = lora_cache.of(lora) if lora is not None else lora_cache.get(lora_name)
        found = tools.inspect_lora(loaded, model, clip, node_id(cls))
        shown_below = {**preview(found.picture).as_dict(), "text": [found.text]}
        return io.NodeOutput(found.text, found.json, as_image(found.picture), ui=shown_below)
