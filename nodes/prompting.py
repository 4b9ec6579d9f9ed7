"""The node that reads LoRAs from a prompt."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.apply import AUTO
from ..host.clocks import RUN
from ..host.prompt_lora import ALL_WORDS, SIDES, apply_prompt
from ..host.prompt_states import prompt_state
from ..kernels.strengths.dialects import HABITS, SDNEXT
from .applying import clock_inputs, course, engine_input, picture_input, preview, reload_input
from .compat import build
from .sockets import CATEGORY, explained


class LoomPromptLoRA(io.ComfyNode):
    """Prompt with tags → MODEL, CLIP, CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def combo(name: str, table: dict[str, str], default: str, tooltip: str):
            return io.Combo.Input(name, options=list(table), default=default, tooltip=f"{tooltip}\n{explained(table)}")

        return build(
            io.Schema,
            node_id="LoomPromptLoRA",
            display_name="LoRA from Prompt",
            category=CATEGORY,
            description=(
                "Loads the LoRAs that the prompt names, <lora:name:0.8>, puts them on MODEL and CLIP, and encodes the "
                "rest of the prompt. Strengths may differ by text encoder, by block and over the run, also those on "
                "text encoders: <lora:name:te=0.1@1,0.6@6>."
            ),
            search_aliases=["lora tag", "prompt lora", "lora from text", "lora schedule", "lbw", "loractl"],
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRAs are put on."),
                io.Clip.Input("clip", tooltip="What encodes the prompt; the LoRAs are put on it, too."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="Text with tags such as <lora:name:0.8>. _tags_ stands for the LoRAs' trigger words. The "
                    "help page lists all that tags may say.",
                ),
                combo("dialect", HABITS, SDNEXT, "Whose tags these are."),
                io.Int.Input(
                    "trigger_words",
                    default=0,
                    min=ALL_WORDS,
                    max=100,
                    tooltip="How many trigger words of each LoRA are put into the prompt, in the place of _tags_ or "
                    "else at its end. -1 is all; 0 is none, but a _tags_ in the prompt then stands for all.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Draws the letters R and U in block weights; nothing else depends on it.",
                ),
                combo("side", SIDES, "one", "Which of two MODELs this is, for families that have one for high noise."),
                engine_input(),
                *clock_inputs(),
                reload_input(),
                picture_input(),
            ],
            outputs=[
                io.Model.Output("patched_model", display_name="model", tooltip="The MODEL with the LoRAs."),
                io.Clip.Output(
                    "patched_clip",
                    display_name="clip",
                    tooltip="The CLIP with the LoRAs, at the weights of the run's beginning where these change.",
                ),
                io.Conditioning.Output(
                    "conditioning",
                    display_name="conditioning",
                    tooltip="The prompt, encoded. If weights on text encoders change over the run, sample with the "
                    "MODEL of this node: it chooses the encoding by the real step.",
                ),
                io.String.Output("text", display_name="text", tooltip="The prompt without tags, as it was encoded."),
                io.String.Output("report", display_name="report", tooltip="What was applied, and what found no place."),
                io.String.Output("tags", display_name="tags", tooltip="The tags in one spelling, the dialect sdnext."),
                io.String.Output("words", display_name="trigger_words", tooltip="All trigger words of the LoRAs."),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, prompt: Any = None, side: Any = None, force_reload: Any = False, **_: Any
    ) -> str | float:
        """Changes with the files; runs before execute and on unchecked strings, so it never raises."""
        return float("nan") if force_reload else prompt_state(prompt, side)

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        prompt: str,
        dialect: str,
        trigger_words: int,
        seed: int,
        side: str,
        engine: str = AUTO,
        clock: str = RUN,
        sigmas: Any = None,
        force_reload: bool = False,
        picture: bool = True,
    ) -> io.NodeOutput:
        run = course(clock, sigmas)
        done = apply_prompt(model, clip, prompt, dialect, engine, run, trigger_words, seed, force_reload, side, picture)
        return io.NodeOutput(
            done.model,
            done.clip,
            done.conditioning,
            done.text,
            done.report,
            done.tags,
            done.words,
            ui=preview(*done.pictures),
        )
