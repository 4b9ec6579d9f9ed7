"""Examples that train: a subject, a style, several concepts, and going on with what is there."""

from example import Example, checkpoint, compared, dataset, empty, encode, group, node, note, own_model, text_view
from example_pictures import rows

SUBJECT = "a zorb on a white background"


def trainer(**values):
    """Wired to the checkpoint ``base`` and to ``data``."""
    given = {"length": 300, "learning_rate": 3e-4, "rank": 8, "alpha": 8.0, "batch_size": 4, "seed": 1}
    wires = {
        "model": ("base", "MODEL"),
        "clip": ("base", "CLIP"),
        "vae": ("base", "VAE"),
        "dataset": ("data", "dataset"),
    }
    return node("LoomLoRATrainer", size=(360, 0), **{**wires, **given, **values})


def optimizer():
    return node("LoomOptimizerSettings", beta2=0.99, schedule="cosine", warmup_steps=10)


def apply(lora=("trainer", "lora")):
    return node("LoomLoRALoaderAdvanced", size=(340, 640), model=("base", "MODEL"), clip=("base", "CLIP"), lora=lora)


def before_and_after(text):
    """The stock model and the trained one, from the same noise: nodes and where they stand."""
    nodes = {
        "applied": apply(),
        "text": encode(text, ("applied", "clip")),
        "negative": encode("", ("applied", "clip"), "Negative prompt"),
        "empty": empty(),
        **compared(("base", "MODEL"), ("text", "CONDITIONING"), ("negative", "CONDITIONING"), "Before", "before"),
        **compared(("applied", "model"), ("text", "CONDITIONING"), ("negative", "CONDITIONING"), "After", "after"),
    }
    columns = [
        ["applied"],
        ["text", "negative", "empty"],
        ["before sampler", "after sampler"],
        ["before pixels", "after pixels"],
        ["before pictures", "after pictures"],
    ]
    return nodes, group("2 · Apply and compare", *columns)


def train_and_apply():
    after, compare = before_and_after(SUBJECT)
    nodes = {
        "base": checkpoint(),
        "data": dataset("zorb"),
        "adapter": node("LoomAdapterSettings", layers="full", conv_rank=8, conv_alpha=8.0),
        "optimizer": optimizer(),
        "trainer": trainer(
            batch_size=8, run_name="zorb", adapter=("adapter", "adapter"), optimizer=("optimizer", "optimizer")
        ),
        "file": node("LoomSaveLoRA", lora=("trainer", "lora"), name="zorb"),
        "report": text_view(("trainer", "report"), "Report", (360, 300)),
        "note": own_model("*length* is short here: 1000 to 2000 steps are usual. Both settings nodes may be left out."),
        **after,
    }
    nodes["empty"] = empty(16)
    train = group("1 · Train", ["note", "base", "data"], ["adapter"], ["optimizer", "file"], ["trainer", "report"])
    return Example(
        "train_and_apply", [train, compare], nodes, rows(("without the LoRA", "Before"), ("with it", "After"))
    )


def style_with_lokr():
    after, compare = before_and_after("a red circle on a white background, blueprint")
    nodes = {
        "base": checkpoint(),
        "captions": node("LoomCaptionSettings", suffix=", blueprint", dropout=0.05),
        "images": node("LoomImageSettings", flip=True),
        "data": dataset("blueprint", captions=("captions", "captions"), images=("images", "images")),
        "sheet": node("LoomContactSheet", dataset=("data", "dataset"), limit=24),
        "shown": node("PreviewImage", "What is trained", size=(WIDE, 300), images=("sheet", "sheet")),
        "adapter": node("LoomAdapterSettings", layers="full", algorithm="LoKr", factor=4),
        "optimizer": optimizer(),
        "preview": node(
            "LoomPreviewSettings",
            prompts="a red circle on a white background, blueprint\na yellow ring on a black background, blueprint",
            every=50,
            cfg=3.0,
            width=32,
            height=32,
            size=(WIDE, 420),
        ),
        "trainer": trainer(
            length=200,
            learning_rate=5e-3,
            run_name="blueprint",
            adapter=("adapter", "adapter"),
            optimizer=("optimizer", "optimizer"),
            preview=("preview", "preview"),
        ),
        "file": node("LoomSaveLoRA", lora=("trainer", "lora"), name="blueprint"),
        "preset": node("LoomSavePreset", lora=("trainer", "lora"), name="my style", if_exists="overwrite"),
        "note": own_model(
            "A style wants 50 to 200 pictures of different things. LoKr learns it in a small file: *factor* sets how "
            "small. **Save Training Preset** keeps these settings for the next one."
        ),
        **after,
    }
    data = group("1 · The style's pictures", ["note", "base"], ["captions"], ["images"], ["data", "sheet", "shown"])
    train = group("2 · Train", ["adapter"], ["optimizer", "preview"], ["trainer", "file", "preset"])
    compare = group("3 · Apply and compare", *compare.columns)
    return Example(
        "style_with_lokr", [data, train, compare], nodes, rows(("without", "Before"), ("in the style", "After"))
    )


def several_concepts():
    def concept(folder, settings):
        return dataset(folder, concept=(settings, "concept"))

    zorb, mell, known = ("text zorb", "CONDITIONING"), ("text mell", "CONDITIONING"), ("text known", "CONDITIONING")
    model, negative = ("applied", "model"), ("negative", "CONDITIONING")
    nodes = {
        "base": checkpoint(),
        "learn": node("LoomConceptSettings", "Concept Settings: to learn", validation_split=0.1),
        "keep": node("LoomConceptSettings", "Concept Settings: to keep", kind="regularisation"),
        "zorb": concept("zorb", "learn"),
        "mell": concept("mell", "learn"),
        "known": concept("known", "keep"),
        "data": node(
            "LoomCombineDatasets",
            balance="equal presentations",
            dataset_1=("zorb", "dataset"),
            dataset_2=("mell", "dataset"),
            dataset_3=("known", "dataset"),
        ),
        "data report": text_view(("data", "report"), "What is trained"),
        "adapter": node("LoomAdapterSettings", layers="full", conv_rank=8, conv_alpha=8.0),
        "optimizer": optimizer(),
        "components": node("LoomComponentSettings", te1_learning_rate=1e-3, size=(WIDE, 0)),
        "run": node("LoomRunSettings", validate_every=50, keep_best=True),
        "trainer": trainer(
            length=240,
            learning_rate=2e-3,
            run_name="zorb and mell",
            **{part: (part, part) for part in ("adapter", "optimizer", "components", "run")},
        ),
        "report": text_view(("trainer", "report"), "Report", (360, 300)),
        "file": node("LoomSaveLoRA", lora=("trainer", "lora"), name="zorb_and_mell"),
        "applied": apply(),
        "text zorb": encode(SUBJECT, ("applied", "clip"), "The first concept"),
        "text mell": encode("a mell on a white background", ("applied", "clip"), "The second concept"),
        "text known": encode("a blue ring on a white background", ("applied", "clip"), "What must stay"),
        "negative": encode("", ("applied", "clip"), "Negative prompt"),
        "empty": empty(6),
        **compared(model, zorb, negative, "Zorb", "zorb"),
        **compared(model, mell, negative, "Mell", "mell"),
        **compared(model, known, negative, "Ring", "ring"),
        "note": own_model(
            "One folder for each concept, with a word of its own in its captions. Pictures of the kind "
            "*regularisation* keep what the model knows; a tenth of the others is held out to measure the loss."
        ),
    }
    samples = ("zorb", "mell", "ring")
    data = group(
        "1 · Concepts", ["note", "base"], ["learn", "keep"], ["zorb", "mell", "known"], ["data", "data report"]
    )
    train = group("2 · Train", ["adapter"], ["optimizer", "components"], ["run"], ["trainer", "report", "file"])
    sample = group(
        "3 · Apply",
        ["applied"],
        ["text zorb", "text mell", "text known", "negative", "empty"],
        *([f"{name} {part}" for name in samples] for part in ("sampler", "pixels", "pictures")),
    )
    picture = rows(("a zorb", "Zorb"), ("a mell", "Mell"), ("a blue ring", "Ring"))
    return Example("several_concepts", [data, train, sample], nodes, picture)


def continue_a_run():
    after, compare = before_and_after(SUBJECT)
    nodes = {
        "base": checkpoint(),
        "data": dataset("zorb"),
        "adapter": node("LoomAdapterSettings", layers="full", conv_rank=8, conv_alpha=8.0),
        "run": node("LoomRunSettings", on_cancel="stop and keep", save_every=40, keep_last=3, ema_decay=0.95),
        "trainer": trainer(
            length=120, run_name="zorb step by step", adapter=("adapter", "adapter"), run=("run", "run")
        ),
        "report": text_view(("trainer", "report"), "Report", (360, 300)),
        "note": note(
            "Stop, and go on",
            "The run folder *output/lora_loom/zorb step by step* keeps the LoRA and the whole state.\n\n"
            "* **Go on**: set *length* to 240 and queue again. It goes on behind step 120, to the same bits as if it "
            "had never stopped.\n"
            "* **Interrupted?** Queue again. The ✕ keeps what was learned (*on_cancel*).\n"
            "* **Earlier is better?** *Read LoRA* lists the LoRA of steps 40 and 80 and the moving average.\n\n"
            "*if_run_exists* set to *new* starts afresh under another name.",
            (WIDE, 340),
        ),
        "read": node("LoomLoadLoRA", source="zorb.safetensors"),
        "words": text_view(("read", "trigger_words"), "Its trigger words", (WIDE, 160)),
        "read optimizer": node("LoomOptimizerSettings", schedule="cosine"),
        "trainer on": node(
            "LoomLoRATrainer",
            "LoRA Trainer: from a file",
            size=(360, 0),
            model=("base", "MODEL"),
            clip=("base", "CLIP"),
            vae=("base", "VAE"),
            dataset=("data", "dataset"),
            start_from=("read", "lora"),
            adapter=("adapter", "adapter"),
            optimizer=("read optimizer", "optimizer"),
            length=40,
            learning_rate=1e-4,
            rank=8,
            alpha=8.0,
            batch_size=4,
            seed=2,
            run_name="zorb refined",
        ),
        "file": node("LoomSaveLoRA", lora=("trainer on", "lora"), name="zorb_refined"),
        "note on": note(
            "Begin with another LoRA",
            "*start_from* takes the weights of any LoRA with the same rank and layers, say *zorb* of the example "
            "**train_and_apply** or one that you have loaded from somewhere. It is a run of its own, with settings "
            "of its own.",
        ),
        **after,
    }
    nodes["applied"] = apply(("trainer on", "lora"))
    go_on = group("1 · Go on with a run", ["note", "base", "data"], ["adapter"], ["run"], ["trainer", "report"])
    begin = group("2 · Begin with a LoRA", ["note on", "read", "words"], ["read optimizer", "file"], ["trainer on"])
    compare = group("3 · Apply and compare", *compare.columns)
    picture = rows(("without", "Before"), ("after going on", "After"))
    return Example("continue_a_run", [go_on, begin, compare], nodes, picture)


WIDE = 360
EXAMPLES = [train_and_apply, style_with_lokr, several_concepts, continue_a_run]
