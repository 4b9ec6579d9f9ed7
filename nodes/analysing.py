"""The node that shows what each block of a LoRA does."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import analyser, lora_cache, loras
from ..host.pictures import as_image
from ..host.previews import sampler_names, scheduler_names
from .applying import FROM_SOCKET, preview
from .compat import build
from .sockets import CATEGORY, LORA_MODEL, explained, node_id


class LoomBlockAnalyser(io.ComfyNode):
    """MODEL, LoRA → a picture for each of its blocks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = analyser.Options()

        def combo(name: str, table: dict[str, str], tooltip: str):
            default = getattr(defaults, name)
            return io.Combo.Input(name, options=list(table), default=default, tooltip=f"{tooltip}\n{explained(table)}")

        return build(
            io.Schema,
            node_id="LoomBlockAnalyser",
            display_name="LoRA Block Analyser",
            category=CATEGORY,
            description=(
                "Shows which block of a LoRA does what: the same picture with every block left out in turn, or with it "
                "alone, beside those with the whole LoRA and without it. The model is loaded once; each picture costs "
                "its steps."
            ),
            search_aliases=["block weight", "lora block weight", "ablation", "effective block analyzer", "xyz plot"],
            inputs=[
                io.Model.Input("model", tooltip="The model, without this LoRA."),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Conditioning.Input("negative", tooltip="What it does not show."),
                io.Latent.Input("latent_image", tooltip="What is sampled from; of a batch the first."),
                io.Vae.Input("vae", tooltip="Makes pictures of what is sampled."),
                io.Combo.Input(
                    "lora_name",
                    options=[FROM_SOCKET, *loras.sources()],
                    default=FROM_SOCKET,
                    tooltip="The file, or what a run keeps. Unused while the lora socket is connected.",
                ),
                io.Float.Input(
                    "strength",
                    default=defaults.strength,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly the LoRA acts.",
                ),
                io.Int.Input(
                    "seed",
                    default=defaults.seed,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="Of the noise, which is the same for all pictures.",
                ),
                io.Int.Input("steps", default=defaults.steps, min=1, max=10_000, tooltip="Of each picture."),
                io.Float.Input(
                    "cfg", default=defaults.cfg, min=0.0, max=100.0, step=0.1, tooltip="As on the KSampler."
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=sampler_names(),
                    default=defaults.sampler_name,
                    tooltip="As on the KSampler.",
                ),
                io.Combo.Input(
                    "scheduler", options=scheduler_names(), default=defaults.scheduler, tooltip="As on the KSampler."
                ),
                io.Float.Input(
                    "denoise",
                    default=defaults.denoise,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the pictures begin with what latent_image shows.",
                ),
                combo("mode", analyser.MODES, "What is shown."),
                combo("granularity", analyser.GRANULARITIES, "What counts as a part."),
                io.String.Input(
                    "blocks",
                    default=defaults.blocks,
                    tooltip="Which ones, with commas between: in, mid, out, OUT3, double.4-8, single.10-, layers.5, "
                    "base. Empty: every block that the LoRA changes.",
                ),
                combo("order", analyser.ORDERS, "Of the pictures."),
                io.Int.Input(
                    "max_pictures",
                    default=defaults.max_pictures,
                    min=3,
                    max=analyser.MOST_PICTURES,
                    tooltip="More pictures than this are refused before the first is begun.",
                ),
                io.Int.Input(
                    "thumbnail",
                    default=defaults.thumbnail,
                    min=analyser.SMALLEST,
                    max=analyser.LARGEST,
                    step=16,
                    tooltip="Longer side of the pictures in the sheet, in pixels.",
                ),
                LORA_MODEL.Input("lora", optional=True, tooltip="A LoRA from this graph, say from the trainer."),
            ],
            outputs=[
                io.Image.Output(
                    "sheet", display_name="sheet", tooltip="All pictures small, each with its label and its number."
                ),
                io.Image.Output(
                    "pictures",
                    display_name="pictures",
                    tooltip="The pictures themselves: without the LoRA, with all of it, then as in the sheet.",
                ),
                io.String.Output("table", display_name="table", tooltip="The numbers of all pictures."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any = None, **_: Any) -> str:
        """Changes with the file; runs before execute and on unchecked strings, so it never raises."""
        return loras.state_of(lora_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent_image: Any,
        vae: Any,
        lora_name: str,
        lora: Any = None,
        **options: Any,
    ) -> io.NodeOutput:
        if lora is None and lora_name == FROM_SOCKET:
            raise ValueError("lora_name: choose a file, or connect the lora socket to a trainer")
        loaded = lora_cache.of(lora) if lora is not None else lora_cache.get(lora_name)
        chosen = analyser.Options(**options)
        found = analyser.analyse(model, positive, negative, latent_image, vae, loaded, chosen, node_id(cls))
        return io.NodeOutput(as_image(found.sheet), found.pictures, found.table, ui=preview(found.sheet))
