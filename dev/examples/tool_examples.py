"""The example with the LoRA tools: merge, inspect, resize, convert, extract, keep what is applied."""

from example import Example, checkpoint, compared, empty, encode, group, node, note, text_view
from example_pictures import rows


def merge_and_convert():
    model, clip, negative = ("base", "MODEL"), ("base", "CLIP"), ("negative", "CONDITIONING")
    both = {"model": model, "clip": clip}

    def report(of, title):
        return text_view((of, "report"), title, (340, 220))

    nodes = {
        "base": checkpoint(),
        "note": note(
            "LoRA tools",
            "*zorb* and *blueprint* are what the examples **train_and_apply** and **style_with_lokr** save; choose "
            "any of your own.\n\n"
            "* **Merge** takes up to eight, of any kind, and more by name; *strengths* has a line for each\n"
            "* the others take one LoRA and hand out another: put them in any order\n"
            "* **Save LoRA** writes it, in the format of other programs too",
            (340, 280),
        ),
        "subject": node("LoomLoadLoRA", "Read LoRA: the subject", source="zorb.safetensors"),
        "style": node("LoomLoadLoRA", "Read LoRA: the style", source="blueprint.safetensors"),
        "merge": node(
            "LoomMergeLoRA",
            size=(340, 640),
            strengths="0.9\n0.8",
            lora_1=("subject", "lora"),
            lora_2=("style", "lora"),
            **both,
        ),
        "merge report": report("merge", "What went in"),
        "merge file": node("LoomSaveLoRA", size=(340, 0), lora=("merge", "lora"), name="zorb_blueprint", **both),
        "inspect": node("LoomInspectLoRA", size=(420, 760), lora=("merge", "lora"), **both),
        "resize": node("LoomResizeLoRA", size=(340, 560), lora=("merge", "lora"), rank=8, **both),
        "resize report": report("resize", "What rank 8 keeps"),
        "convert": node(
            "LoomConvertLoRA",
            size=(340, 560),
            lora=("resize", "lora"),
            dialect="kohya",
            precision="float16",
            plain=True,
            **both,
        ),
        "convert report": report("convert", "For other programs"),
        "convert file": node("LoomSaveLoRA", size=(340, 0), lora=("convert", "lora"), name="zorb_blueprint_kohya"),
        "applied": node("LoomLoRALoaderAdvanced", size=(340, 640), lora=("merge", "lora"), **both),
        "bake": node("LoomBakeApplied", size=(340, 560), model=("applied", "model"), clip=("applied", "clip")),
        "bake report": report("bake", "All that was applied"),
        "extract": node(
            "LoomExtractLoRA", size=(340, 640), model_tuned=("applied", "model"), model_base=model, rank=16
        ),
        "extract report": report("extract", "What one model has and the other not"),
        "text": encode("a zorb on a white background, blueprint", ("applied", "clip")),
        "negative": encode("", ("applied", "clip"), "Negative prompt"),
        "empty": empty(),
        **compared(model, ("text", "CONDITIONING"), negative, "Without", "before"),
        **compared(("applied", "model"), ("text", "CONDITIONING"), negative, "With the merged LoRA", "after"),
    }
    groups = [
        group("1 · Merge", ["note", "base", "subject", "style"], ["merge", "merge report", "merge file"]),
        group("2 · Look inside", ["inspect"]),
        group(
            "3 · Smaller, and for other programs",
            ["resize", "resize report"],
            ["convert", "convert report", "convert file"],
        ),
        group("4 · Apply, and take it back out", ["applied"], ["bake", "bake report"], ["extract", "extract report"]),
        group(
            "5 · Sample",
            ["text", "negative", "empty"],
            *([f"{name} {part}" for name in ("before", "after")] for part in ("sampler", "pixels", "pictures")),
        ),
    ]
    return Example(
        "merge_and_convert", groups, nodes, rows(("without", "Without"), ("subject + style", "With the merged LoRA"))
    )


EXAMPLES = [merge_and_convert]
