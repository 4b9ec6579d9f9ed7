"""Nodes that put a LoRA on a MODEL and a CLIP."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..host import applied, block_routes, lora_cache, loras
from ..host.apply import AUTO, ENGINES, Applied, Strengths, apply_lora
from ..host.clocks import CLOCKS, RUN, Course
from ..host.pictures import as_image, below
from ..kernels.strengths.components import parse_components
from ..kernels.strengths.schedule import HOLD, INTERPOLATIONS, fixed, parse
from .compat import build
from .sockets import CATEGORY, LORA_MODEL, explained

FROM_SOCKET = "(from the lora socket)"


def strength(name: str, what: str, **details: Any) -> Any:
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        tooltip=f"How strongly the LoRA acts on the {what}. 0 leaves it as it is; negative turns it around.",
        **details,
    )


def engine_input() -> Any:
    return io.Combo.Input(
        "engine",
        options=list(ENGINES),
        default=AUTO,
        optional=True,
        tooltip=f"How the LoRA acts.\n{explained(ENGINES)}",
    )


def clock_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "clock",
            options=list(CLOCKS),
            default=RUN,
            optional=True,
            tooltip=f"Which steps the places behind @ are counted in.\n{explained(CLOCKS)}",
        ),
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="For the clock trajectory: the sigmas of the whole way, so that steps can be counted along it.",
        ),
    ]


def reload_input() -> Any:
    return io.Boolean.Input(
        "force_reload",
        default=False,
        optional=True,
        tooltip="Read the file again even if its size and time are the same as before.",
    )


def course(clock: str, sigmas: Any) -> Course:
    """From the widgets. Raises ValueError naming the one that is wrong."""
    return Course(clock, () if sigmas is None else tuple(float(sigma) for sigma in sigmas.flatten().tolist()))


def preview(*pictures: Any) -> Any:
    """Pictures under the node, one below the other; None where there is none."""
    found = [picture for picture in pictures if picture is not None]
    if not found:
        return None
    return ui.PreviewImage(as_image(below(found)))


def shown(picture: Any, blocks: dict[str, Any]) -> dict[str, Any]:
    """What the page gets: the picture under the node, and which blocks the LoRA was put on."""
    return blocks if picture is None else {**picture.as_dict(), **blocks}


def picture_input() -> Any:
    return io.Boolean.Input(
        "picture",
        default=True,
        optional=True,
        tooltip="Show how much each block changes, and weights over the steps, below the node. Off saves reading the "
        "model's weights once.",
    )


class LoomLoRALoaderAdvanced(io.ComfyNode):
    """File or LORA_MODEL → MODEL, CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomLoRALoaderAdvanced",
            display_name="LoRA Loader (Advanced)",
            category=CATEGORY,
            description=(
                "Applies a LoRA to a MODEL and a CLIP: a file from the loras folder, one that a run keeps, or one that "
                "was trained a moment ago in this graph (connect the lora socket). Its strength may differ by text "
                "encoder, by block and over the steps."
            ),
            search_aliases=["lora loader", "load lora", "apply lora", "lora block weight", "lora schedule"],
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRA is put on."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRAs trained on it too."),
                io.Combo.Input(
                    "lora_name",
                    options=[FROM_SOCKET, *loras.sources()],
                    default=FROM_SOCKET,
                    tooltip="The file, or what a run keeps. Unused while the lora socket is connected.",
                ),
                strength("strength_model", "MODEL"),
                strength("strength_clip", "CLIP"),
                LORA_MODEL.Input("lora", optional=True, tooltip="A LoRA from this graph, say from the trainer."),
                engine_input(),
                io.String.Input(
                    "components",
                    default="",
                    optional=True,
                    tooltip="Factors for parts: unet=0.5, te1=0.3, te2=0. te means all text encoders; a part may also "
                    "bear its own name (clip_l, clip_g, t5xxl). Empty: 1 for all.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Factors for blocks and kinds of layers, one a line or with commas: in=0.5, IN4-8=1, "
                    "double.3=0, attn=0.5, out/ff=0, base=0. The last that names a layer counts. Or a vector as people "
                    "carry them (1,0,0,…: 12, 17, 20 or 26 numbers for SD, 57, 58 or 61 for Flux, 1 + blocks for any "
                    "model), or a preset such as OUTD. Empty: 1 everywhere.",
                ),
                io.String.Input(
                    "steps",
                    default="",
                    optional=True,
                    tooltip="A factor over the run: 0.1@1, 0.6@6 is 0.1 from the first step and 0.6 from the sixth on; "
                    "1@0.5 or 1@50% from half of the run on, 1@s2.5 from the noise level 2.5 on. Empty: 1 throughout.",
                ),
                io.Combo.Input(
                    "interpolation",
                    options=list(INTERPOLATIONS),
                    default=HOLD,
                    optional=True,
                    tooltip=f"Between the points of steps, components and blocks.\n{explained(INTERPOLATIONS)}",
                ),
                *clock_inputs(),
                picture_input(),
                reload_input(),
            ],
            outputs=[
                io.Model.Output("patched_model", display_name="model", tooltip="The MODEL with the LoRA."),
                io.Clip.Output("patched_clip", display_name="clip", tooltip="The CLIP with the LoRA."),
                io.String.Output(
                    "trigger_words", display_name="trigger_words", tooltip="Words the LoRA was trained to react to."
                ),
                io.String.Output("report", display_name="report", tooltip="What was applied, and what found no place."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any = None, force_reload: Any = False, **_: Any) -> str | float:
        """Changes with the file, what lies beside it and presets; runs before execute and on unchecked strings, so it
        never raises."""
        return float("nan") if force_reload else loras.state_of(lora_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        lora: Any = None,
        engine: str = AUTO,
        components: str = "",
        blocks: str = "",
        steps: str = "",
        interpolation: str = HOLD,
        clock: str = RUN,
        sigmas: Any = None,
        picture: bool = True,
        force_reload: bool = False,
    ) -> io.NodeOutput:
        if lora is None and lora_name == FROM_SOCKET:
            raise ValueError("lora_name: choose a file, or connect the lora socket to a trainer")
        strengths = Strengths(
            fixed(strength_model),
            fixed(strength_clip),
            parse_components(components, interpolation=interpolation),
            blocks,
            parse(steps, "steps", interpolation) if steps.strip() else fixed(1.0),
            interpolation,
            course=course(clock, sigmas),
        )
        loaded = lora_cache.of(lora) if lora is not None else lora_cache.get(lora_name, force_reload)
        new_model, new_clip, found = apply_lora(model, clip, loaded, strengths, engine)
        found = found.noting(_in_vain(strengths, found, clip, interpolation))
        applied.log(loaded.name, found)
        facts = loaded.facts()
        text, image = applied.account(loaded.name, found, facts, model, strengths, picture)
        layers = applied.layer_adapters(found)
        told = block_routes.remember(model, None if lora is not None else lora_name, layers)
        return io.NodeOutput(new_model, new_clip, ", ".join(facts.words), text, ui=shown(preview(image), told))


def _in_vain(strengths: Strengths, found: Applied, clip: Any, interpolation: str) -> list[str]:
    """What was set and changes nothing, in sentences."""
    changing = any(strength.schedules for strength in found.strengths.values())
    asked = any(part.constant is None for part in (strengths.steps, *strengths.components.values()))
    notes = []
    if not changing and interpolation != HOLD and not asked:
        notes.append("interpolation: no effect, nothing changes over the run")
    notes += strengths.course.without_effect(changing)
    if clip is None and strengths.clip.constant != 1:
        notes.append("strength_clip: no effect without a CLIP; connect it, or leave it at 1")
    if asked and not found.strengths:
        notes.append("steps: no effect, this LoRA has no part on the MODEL")
    return notes
