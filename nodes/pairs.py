"""The node that puts a LoRA on two MODELs, for high and for low noise."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import block_routes, loras, pairs
from ..host.apply import AUTO, Strengths
from ..host.clocks import RUN
from ..kernels.strengths.schedule import fixed, parse
from .applying import clock_inputs, course, engine_input, picture_input, preview, shown, strength
from .compat import build
from .sockets import CATEGORY, LORA_MODEL, explained


class LoomLoRAPair(io.ComfyNode):
    """Files or LORA_MODELs → two MODELs, CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = loras.sources()
        return build(
            io.Schema,
            node_id="LoomLoRAPair",
            display_name="LoRA Pair (high and low noise)",
            category=CATEGORY,
            description=(
                "Puts a LoRA on the two MODELs of Wan 2.2, for high and for low noise. Choose one file: the other one "
                "of the pair is found by its name, a file with keys for both is split, and one for both MODELs goes "
                "on both."
            ),
            search_aliases=["wan 2.2 lora", "high noise lora", "low noise lora", "lora pair", "two models lora"],
            inputs=[
                io.Model.Input("model_high", tooltip="The MODEL for high noise: it does the first part of the run."),
                io.Model.Input("model_low", tooltip="The MODEL for low noise: it does the second part of the run."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRAs trained on it too."),
                io.Combo.Input(
                    "lora_name",
                    options=[pairs.FROM_SOCKETS, *names],
                    default=pairs.FROM_SOCKETS,
                    tooltip="One file of the pair, whichever, or what a run keeps. A connected socket counts instead "
                    "for its MODEL.",
                ),
                io.Combo.Input(
                    "partner",
                    options=[pairs.FIND, pairs.NONE, *names],
                    default=pairs.FIND,
                    tooltip=(
                        f"{pairs.FIND}: the file of the same name with the other mark, such as cat_low for cat_high, "
                        f"in the same folder or else in another.\n{pairs.NONE}: no second file."
                    ),
                ),
                strength("strength_high", "MODEL for high noise"),
                strength("strength_low", "MODEL for low noise"),
                strength("strength_clip", "CLIP"),
                io.Combo.Input(
                    "side",
                    options=list(pairs.SIDES),
                    default=pairs.AUTOMATIC,
                    tooltip=f"Which MODEL the file in lora_name is for.\n{explained(pairs.SIDES)}",
                ),
                engine_input(),
                io.String.Input(
                    "blocks",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Strengths of single blocks, for both MODELs: rules such as blocks.0-9=0.5, a vector, or "
                    "the name of a preset. Empty: 1 everywhere.",
                ),
                io.String.Input(
                    "steps",
                    default="",
                    optional=True,
                    tooltip="A factor that changes over the run, for both MODELs: 1@1,0.5@4 is 1 at first and 0.5 from "
                    "the 4th step on. Empty: 1 all the time.",
                ),
                *clock_inputs(),
                LORA_MODEL.Input("lora_high", optional=True, tooltip="A LoRA from this graph for high noise."),
                LORA_MODEL.Input("lora_low", optional=True, tooltip="A LoRA from this graph for low noise."),
                picture_input(),
            ],
            outputs=[
                io.Model.Output("patched_high", display_name="model_high", tooltip="For high noise, with its LoRA."),
                io.Model.Output("patched_low", display_name="model_low", tooltip="For low noise, with its LoRA."),
                io.Clip.Output("patched_clip", display_name="clip", tooltip="The CLIP with the LoRA."),
                io.String.Output(
                    "trigger_words", display_name="trigger_words", tooltip="Words the LoRAs were trained to react to."
                ),
                io.String.Output(
                    "report", display_name="report", tooltip="Which file went where and why, and what found no place."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any = None, partner: Any = None, **_: Any) -> str:
        """Changes with the files; runs before execute and on unchecked strings, so it never raises."""
        return pairs.state(lora_name, partner)

    @classmethod
    def execute(
        cls,
        model_high: Any,
        model_low: Any,
        lora_name: str,
        partner: str,
        strength_high: float,
        strength_low: float,
        strength_clip: float,
        side: str,
        engine: str = AUTO,
        blocks: str = "",
        steps: str = "",
        clock: str = RUN,
        clip: Any = None,
        lora_high: Any = None,
        lora_low: Any = None,
        sigmas: Any = None,
        picture: bool = True,
    ) -> io.NodeOutput:
        run = course(clock, sigmas)
        over_run = parse(steps, "steps") if steps.strip() else fixed(1.0)
        strengths = {
            side_of: Strengths(fixed(weight), fixed(strength_clip), blocks=blocks, steps=over_run, course=run)
            for side_of, weight in ((pairs.HIGH, strength_high), (pairs.LOW, strength_low))
        }
        choice = pairs.Choice(lora_name, partner, side, lora_high, lora_low)
        models = {pairs.HIGH: model_high, pairs.LOW: model_low}
        done, new_clip, words, report, pictures = pairs.apply_pair(models, clip, choice, strengths, engine, picture)
        both = done[pairs.HIGH], done[pairs.LOW]
        told = block_routes.remember(model_high, None if lora_high is not None else lora_name)
        return io.NodeOutput(*both, new_clip, ", ".join(words), report, ui=shown(preview(*pictures), told))
