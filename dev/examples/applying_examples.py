"""Examples that apply: by block and step, and on the two models of Wan 2.2."""

from example import Example, checkpoint, compared, dataset, empty, encode, group, node, note, saved, text_view
from example_pictures import rows, sheet

LORA = "zorb.safetensors"
SUBJECT = "a zorb on a white background"
WAN_STEPS, WAN_SWITCH = 20, 10


def block_and_step_weights():
    negative = ("negative", "CONDITIONING")
    nodes = {
        "base": checkpoint(),
        "note": note(
            "Weights by block and by step",
            "*zorb.safetensors* is what the example **train_and_apply** saves; choose any LoRA of your own.\n\n"
            "* **blocks**: `in=0.2` is weaker on the way in; presets and vectors of numbers do as well\n"
            "* **steps**: `0@1,1@4` is nothing at first and all of it from the fourth step on\n"
            "* **tags** say the same in a prompt: weaker on the way out until the sixth step\n"
            "* the **analyser** shows what each block does: write what you find into *blocks*",
            (340, 320),
        ),
        "negative": encode("", ("base", "CLIP"), "Negative prompt"),
        "empty": empty(4),
        "weighted": node(
            "LoomLoRALoaderAdvanced",
            "By widgets: LoRA Loader (Advanced)",
            size=(360, 640),
            model=("base", "MODEL"),
            clip=("base", "CLIP"),
            lora_name=LORA,
            blocks="in=0.2\nout=1",
            steps="0@1,1@4",
            interpolation="linear",
        ),
        "weighted text": encode(SUBJECT, ("weighted", "clip")),
        "weighted report": text_view(("weighted", "report"), "What acts how strongly", (360, 300)),
        **compared(("weighted", "model"), ("weighted text", "CONDITIONING"), negative, "By widgets", "widgets"),
        "tagged": node(
            "LoomPromptLoRA",
            "By tags: LoRA from Prompt",
            size=(360, 640),
            model=("base", "MODEL"),
            clip=("base", "CLIP"),
            prompt=f"{SUBJECT} <lora:zorb:unet=0.9:out=0.2@1,1@6>",
        ),
        "tagged report": text_view(("tagged", "report"), "What acts how strongly", (360, 300)),
        **compared(("tagged", "model"), ("tagged", "conditioning"), negative, "By tags", "tags"),
        "analysed text": encode(SUBJECT, ("base", "CLIP")),
        "analyser": node(
            "LoomBlockAnalyser",
            model=("base", "MODEL"),
            positive=("analysed text", "CONDITIONING"),
            negative=negative,
            latent_image=("one", "LATENT"),
            vae=("base", "VAE"),
            lora_name=LORA,
            cfg=3.0,
            steps=6,
            thumbnail=96,
        ),
        "one": empty(1),
        "analysed": saved(("analyser", "sheet"), "blocks", "The picture without each block"),
        "table": text_view(("analyser", "table"), "Differences, block by block", (360, 340)),
    }
    begin = group("1 · Model", ["note", "base", "negative", "empty"])
    kinds = (("widgets", "weighted", ["weighted text", "widgets sampler", "widgets pixels"]),)
    kinds += (("tags", "tagged", ["tags sampler", "tags pixels"]),)
    both = [
        group(f"{number} · By {kind}", [first], [*middle], [f"{kind} pictures", f"{first} report"])
        for number, (kind, first, middle) in enumerate(kinds, 2)
    ]
    look = group("4 · What does each block do?", ["analysed text", "one"], ["analyser"], ["analysed", "table"])
    picture = sheet("The picture without each block", "without each block of the LoRA")
    return Example("block_and_step_weights", [begin, *both, look], nodes, picture)


def wan_pair():
    def side(name, low, high, title):
        model = f"base {name}"
        return {
            f"timesteps {name}": node(
                "LoomObjectiveSettings", f"Objective Settings: {title}", min_timestep=low, max_timestep=high
            ),
            f"trainer {name}": node(
                "LoomLoRATrainer",
                f"LoRA Trainer: {title}",
                size=(360, 0),
                model=(model, "MODEL"),
                clip=("clip", "CLIP"),
                vae=("vae", "VAE"),
                dataset=("data", "dataset"),
                objective=(f"timesteps {name}", "objective"),
                length=60,
                run_name=f"zorb_{name}_noise",
            ),
            f"file {name}": node("LoomSaveLoRA", lora=(f"trainer {name}", "lora"), name=f"zorb_{name}_noise"),
        }

    def shifted(name):
        return node("ModelSamplingSD3", model=("pair", f"model_{name}"), shift=8.0)

    def half(name, **values):
        links = {"positive": ("text", "CONDITIONING"), "negative": ("negative", "CONDITIONING")}
        given = {"noise_seed": 7, "steps": WAN_STEPS, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple"}
        return node(
            "KSamplerAdvanced",
            f"{name.capitalize()} noise",
            model=(f"shift {name}", "MODEL"),
            control_after_generate="fixed",
            **links,
            **given,
            **values,
        )

    nodes = {
        "base high": node(
            "UNETLoader", "Wan 2.2 for high noise", unet_name="wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"
        ),
        "base low": node(
            "UNETLoader", "Wan 2.2 for low noise", unet_name="wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"
        ),
        "clip": node("CLIPLoader", clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan"),
        "vae": node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "data": dataset("zorb", resolution=256, bucket_step=32),
        "note": note(
            "Two models, two LoRAs",
            "Wan 2.2 does the first part of a run with one model and the rest with another. Each trainer learns the "
            "noise of its side: above and below the timestep 875.\n\n"
            "**LoRA Pair** puts each LoRA on its model. With files, choose either of the two; the other one is "
            "found.\n\n"
            "*length* and *resolution* are small here: 1000 steps or more at 512 to 768 are usual. Videos are "
            "trained as single pictures; raise *length* of the empty latent to sample one.",
            (340, 320),
        ),
        **side("high", 875, 1000, "high noise"),
        **side("low", 0, 875, "low noise"),
        "pair": node(
            "LoomLoRAPair",
            size=(360, 640),
            model_high=("base high", "MODEL"),
            model_low=("base low", "MODEL"),
            clip=("clip", "CLIP"),
            lora_high=("trainer high", "lora"),
            lora_low=("trainer low", "lora"),
        ),
        "pair report": text_view(("pair", "report"), "Which LoRA went where", (360, 260)),
        "shift high": shifted("high"),
        "shift low": shifted("low"),
        "text": encode(SUBJECT, ("pair", "clip")),
        "negative": encode("blurry", ("pair", "clip"), "Negative prompt"),
        "empty": node("EmptyHunyuanLatentVideo", width=256, height=256, length=1, batch_size=1),
        "sampler high": half(
            "high",
            latent_image=("empty", "LATENT"),
            add_noise="enable",
            start_at_step=0,
            end_at_step=WAN_SWITCH,
            return_with_leftover_noise="enable",
        ),
        "sampler low": half(
            "low",
            latent_image=("sampler high", "LATENT"),
            add_noise="disable",
            start_at_step=WAN_SWITCH,
            end_at_step=10000,
            return_with_leftover_noise="disable",
        ),
        "pixels": node("VAEDecode", size=(200, 0), samples=("sampler low", "LATENT"), vae=("vae", "VAE")),
        "pictures": saved(("pixels", "IMAGE"), "wan_pair", "With both LoRAs"),
    }
    load = group("1 · Models and pictures", ["note", "clip", "vae"], ["base high", "base low", "data"])
    train = group(
        "2 · Train both",
        ["timesteps high"],
        ["timesteps low"],
        ["trainer high", "file high"],
        ["trainer low", "file low"],
    )
    sample = group(
        "3 · Apply both",
        ["pair", "pair report"],
        ["shift high", "shift low", "text", "negative", "empty"],
        ["sampler high", "sampler low"],
        ["pixels", "pictures"],
    )
    return Example("wan_2_2_pair", [load, train, sample], nodes, rows(("high and low noise", "With both LoRAs")))


EXAMPLES = [block_and_step_weights, wan_pair]
