"""Examples that prepare datasets: by a program, through other nodes, out of pictures of the graph."""

from example import CHECKPOINT, Example, dataset, decoded, empty, encode, group, node, note, sampler, text_view
from example_pictures import sheet

SHEET = (560, 560)
PROGRAM = r"""# one edit a line; the help page of this node lists them all
replace pattern " on a (\w+) background" with ", \1 background" in captions
replace text "a zorb" with "bullseye"
add "simple drawing" at end
remove "black background"
put trigger "ohwx" first"""


def contact_sheet(data, title, **values):
    return {
        "sheet": node("LoomContactSheet", size=(280, 0), dataset=data, **values),
        "shown": node("PreviewImage", title, size=SHEET, images=("sheet", "sheet")),
    }


def captions_by_program():
    nodes = {
        "data": dataset("zorb"),
        "note": note(
            "Captions, edited by a program",
            "**Tag Editor** carries out its lines, one after the other, whenever the dataset is read: rename, remove, "
            "sort, put a trigger first. Caption files stay as they are.\n\n"
            "Write the lines, or open the editor and edit picture by picture: it writes them for you. Connect the "
            "*dataset* to the LoRA Trainer.",
            (340, 240),
        ),
        "check": node("LoomDatasetLint", dataset=("data", "dataset")),
        "found": text_view(("check", "report"), "What was found", (340, 240)),
        "edit": node("LoomTagEditor", size=(420, 420), dataset=("check", "dataset"), program=PROGRAM),
        "done": text_view(("edit", "report"), "What each line did", (420, 300)),
        **contact_sheet(("edit", "dataset"), "The dataset with its new captions", columns=6, limit=24),
        "toml": node("LoomDatasetToTOML", size=(280, 0), dataset=("edit", "dataset")),
        "toml text": text_view(("toml", "toml"), "The dataset for sd-scripts", (280, 240)),
    }
    groups = [
        group("1 · Read and check", ["note", "data"], ["check", "found"]),
        group("2 · Edit", ["edit", "done"]),
        group("3 · Look", ["sheet", "toml", "toml text"], ["shown"]),
    ]
    picture = sheet("The dataset with its new captions", "captions edited by a program")
    return Example("captions_by_program", groups, nodes, picture)


def edit_captions():
    nodes = {
        "data": dataset("zorb"),
        "out": node("LoomDatasetToGraph", dataset=("data", "dataset"), with_images=False),
        "drop": node(
            "RegexReplace",
            "Drop the background from every caption",
            (340, 420),
            string=("out", "captions"),
            regex_pattern=",?\\s*\\bon a \\w+ background\\b",
        ),
        "front": node(
            "StringConcatenate",
            "Put words in front of every caption",
            (340, 240),
            string_a="my style",
            string_b=("drop", "STRING"),
            delimiter=", ",
        ),
        "back": node(
            "LoomDatasetUpdate",
            size=(280, 0),
            dataset=("data", "dataset"),
            ids=("out", "ids"),
            captions=("front", "STRING"),
        ),
        **contact_sheet(("back", "dataset"), "The dataset with its new captions", columns=6, limit=24),
        "done": text_view(("back", "report"), "What was changed", (280, 240)),
        "note": note(
            "And then",
            "Any node that changes texts does, captioners too. Connect the *dataset* of **Update Dataset** to the LoRA "
            "Trainer. Caption files stay as they are. Switch *with_images* on in **Dataset to Graph** to change "
            "images too.",
            (340, 200),
        ),
    }
    groups = [
        group("1 · Captions out", ["note", "data"], ["out"]),
        group("2 · Edit", ["drop", "front"]),
        group("3 · Back in, and look", ["back", "sheet", "done"], ["shown"]),
    ]
    picture = sheet("The dataset with its new captions", "captions edited by any node")
    return Example("edit_captions", groups, nodes, picture)


def upscale_small_images():
    nodes = {
        "data": dataset("zorb", resolution=64, trigger="zorb", lint="off"),
        "check": node("LoomDatasetLint", size=(340, 0), dataset=("data", "dataset"), checks="full"),
        "found": text_view(("check", "report"), "What was found", (340, 260)),
        "out": node(
            "LoomDatasetToGraph",
            "Images that are small, blurred or compressed",
            dataset=("check", "dataset"),
            findings=("check", "findings"),
            filter="lint:D021 OR lint:D031",
        ),
        "upscaler": node("UpscaleModelLoader", model_name="RealESRGAN_x2plus.pth"),
        "larger": node(
            "ImageUpscaleWithModel", size=(280, 0), upscale_model=("upscaler", "UPSCALE_MODEL"), image=("out", "images")
        ),
        "back": node(
            "LoomDatasetUpdate",
            size=(280, 0),
            dataset=("check", "dataset"),
            ids=("out", "ids"),
            images=("larger", "IMAGE"),
        ),
        **contact_sheet(("back", "dataset"), "The dataset as it is trained", columns=6, limit=24),
        "note": note(
            "And then",
            "Connect the *dataset* of **Update Dataset** to the LoRA Trainer. Files in the folder stay as they are. "
            "The *filter* chooses what goes out: findings, tags, sizes; its tooltip tells how.",
        ),
    }
    groups = [
        group("1 · Find", ["note", "data"], ["check", "found"]),
        group("2 · Upscale", ["out", "upscaler"], ["larger", "back"]),
        group("3 · Look", ["sheet"], ["shown"]),
    ]
    picture = sheet("The dataset as it is trained", "small pictures, enlarged")
    return Example("upscale_small_images", groups, nodes, picture)


def pictures_of_the_graph():
    """Pictures the model makes itself keep what it knows while something new is learned."""
    nodes = {
        "base": node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "text": encode("a green triangle on a white background", ("base", "CLIP"), "What the model knows"),
        "negative": encode("", ("base", "CLIP"), "Negative prompt"),
        "empty": empty(12),
        "sampler": sampler(
            ("base", "MODEL"), ("text", "CONDITIONING"), ("negative", "CONDITIONING"), ("empty", "LATENT")
        ),
        "pixels": decoded(("sampler", "LATENT"), ("base", "VAE")),
        "keep": node("LoomConceptSettings", kind="regularisation", loss_weight=0.5),
        "made": node(
            "LoomDatasetFromImages",
            images=("pixels", "IMAGE"),
            captions="a green triangle on a white background",
            resolution=32,
            bucket_step=8,
            concept_settings=("keep", "concept"),
            size=(320, 440),
        ),
        "data": dataset("zorb"),
        "both": node(
            "LoomCombineDatasets", size=(280, 0), dataset_1=("data", "dataset"), dataset_2=("made", "dataset")
        ),
        "report": text_view(("both", "report"), "What is trained", (280, 260)),
        **contact_sheet(("both", "dataset"), "Both datasets, as they are trained", columns=8, limit=48),
        "note": note(
            "Pictures out of the graph",
            "**Dataset from Images** makes a dataset of any IMAGE: loaded, sampled, upscaled, or of video frames. Here "
            "the model makes pictures of what it knows; as *regularisation* they keep it from forgetting while it "
            "learns the folder's.\n\nConnect the *dataset* of **Combine Datasets** to the LoRA Trainer.",
            (320, 260),
        ),
    }
    groups = [
        group("1 · Make pictures", ["note", "base"], ["text", "negative", "empty"], ["sampler", "pixels"]),
        group("2 · Make a dataset of them", ["keep"], ["made", "data"]),
        group("3 · Combine, and look", ["both", "sheet", "report"], ["shown"]),
    ]
    picture = sheet("Both datasets, as they are trained", "a folder, and pictures the model made")
    return Example("pictures_of_the_graph", groups, nodes, picture)


EXAMPLES = [captions_by_program, edit_captions, upscale_small_images, pictures_of_the_graph]
