"""Automatic fixes: each cures what the check found, once; files and the old dataset stay as they were."""

import hashlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import skimage
from PIL import Image

from lora_loom.training.dataset.balancing import table
from lora_loom.training.dataset.fixes import apply_fixes
from lora_loom.training.dataset.images import read_header
from lora_loom.training.dataset.lint import lint
from lora_loom.training.dataset.lint_knowledge import TagKnowledge
from lora_loom.training.dataset.lint_rules import FIXABLE, RULES
from lora_loom.training.dataset.model import (
    BucketOptions,
    CaptionOptions,
    Concept,
    Dataset,
    DatasetError,
    FilePicture,
    Header,
    ImageOptions,
    Sample,
)

PHOTOS = Path(skimage.__file__).parent / "data"
CONCEPT = Concept(name="ohwx", resolutions=((512, 512),))


def picture(number, **header):
    return FilePicture(f"{number}.jpg", Header(512, 512, "PNG", "RGB", **header), 1000, 1)


def dataset(texts, *concepts, **options):
    """One sample per text, which is (concept, caption) where there are several concepts."""
    concepts = concepts or (replace(CONCEPT, **options),)
    pairs = [text if isinstance(text, tuple) else (0, text) for text in texts]
    samples = [Sample(f"{n}.jpg", picture(n), caption, concept) for n, (concept, caption) in enumerate(pairs)]
    return Dataset("set", concepts, tuple(samples))


def captions(data):
    return [sample.caption for sample in data.samples]


def cured(data, rule, **options):
    """The dataset with one fix, after which the rule is silent and fixing again changes nothing."""
    findings = lint(data, **options)
    assert rule in {finding.rule for finding in findings}
    before = hash(data.fingerprint())
    fixed = apply_fixes(data, findings, {rule})
    assert hash(data.fingerprint()) == before
    assert rule not in {finding.rule for finding in lint(fixed, **options)}
    again = apply_fixes(fixed, findings, {rule})
    assert (again.samples, again.concepts) == (fixed.samples, fixed.concepts)
    assert apply_fixes(fixed, lint(fixed, **options), {rule}).fingerprint() == fixed.fingerprint()
    [note] = fixed.notes
    assert note.startswith(f"{rule} ({RULES[rule].title}): ")
    return fixed


def test_captions_that_say_nothing():
    fixed = cured(dataset(["", "\ufeffa, b\x00", "c"]), "T001")
    assert captions(fixed) == ["ohwx", "a, b", "c"]
    assert fixed.notes == ("T001 (captions that say nothing): 2 captions changed (0.jpg, 1.jpg)",)


def test_lost_letters_cannot_be_fixed():
    data = dataset(["caf\ufffd"])
    assert captions(apply_fixes(data, lint(data), ["T001"])) == ["caf\ufffd"]


def test_trigger_first():
    options = CaptionOptions(trigger="ohwx")
    fixed = cured(dataset(["a, ohwx, b", "ohwx, c", "d"], captions=options), "T002")
    assert captions(fixed) == ["ohwx, a, b", "ohwx, c", "ohwx, d"]
    fixed = cured(dataset([*(f"zyx, thing {n}" for n in "abcdefghi"), "b, zyx, a"]), "T002")
    assert captions(fixed)[-1] == "zyx, b, a"


def test_outfit_second():
    concepts = [replace(CONCEPT, name=name, captions=CaptionOptions(trigger="ohwx")) for name in ("armour", "dress")]
    texts = [(0, f"ohwx, steel armour, {n} trees") for n in range(5)] + [(0, "ohwx, rain, steel armour"), (0, "rain")]
    texts += [(1, f"ohwx, ball gown, {n} clouds") for n in range(5)]
    fixed = cured(dataset(texts, *concepts), "T004")
    assert captions(fixed)[5:7] == ["ohwx, steel armour, rain", "steel armour, rain"]


def test_implied_tags():
    data = dataset(["black_hair, hair, german shepherd, dog, animal", "hair, x"])
    knowledge = TagKnowledge(implications={"german shepherd": frozenset({"dog"}), "dog": frozenset({"animal"})})
    assert captions(cured(data, "T020", knowledge=knowledge)) == ["black_hair, german shepherd", "hair, x"]


def test_spellings():
    texts = ["long_hair, score_9, a", "long hair, b,  c", r"miku \(vocaloid\), d, D", "miku (vocaloid), sole_female"]
    knowledge = TagKnowledge(aliases={"sole female": "1girl"})
    fixed = cured(dataset(texts, captions=CaptionOptions(trigger="my_trigger")), "T021", knowledge=knowledge)
    expected = ["long hair, score_9, a", "long hair, b,  c", "miku (vocaloid), d", "miku (vocaloid), 1girl"]
    assert captions(fixed) == expected
    assert "3 captions changed" in fixed.notes[0]


def test_typing_mistakes():
    data = dataset(["smiling, a"] * 5 + ["smilling, b", "frowning, c"])
    assert captions(cured(data, "T023"))[5:] == ["smiling, b", "frowning, c"]


def test_mirroring_ends_where_it_harms():
    concepts = [replace(CONCEPT, name=name, images=ImageOptions(flip=True, rotate=5)) for name in ("one", "two")]
    fixed = cured(dataset([(0, "left arm up"), (1, "smile")], *concepts), "A001")
    assert [concept.images for concept in fixed.concepts] == [ImageOptions(rotate=5), ImageOptions(flip=True, rotate=5)]
    assert fixed.notes == ("A001 (mirrored asymmetry): changed for “one”",)


def test_transparency_becomes_a_mask():
    data = dataset(["a", "b"])
    clear = replace(data.samples[0], picture=picture(0, transparent=True))
    fixed = cured(replace(data, samples=(clear, data.samples[1])), "D010")
    assert fixed.concepts[0].images == ImageOptions(alpha_mask=True)


def test_max_side_is_left_to_the_aspect():
    data = dataset(["a"], resolutions=((1024, 1024),), buckets=BucketOptions(max_side=1024, step=32))
    assert cured(data, "D023").concepts[0].buckets == BucketOptions(step=32)


def test_balance():
    concepts = [replace(CONCEPT, name=name, repeats=Fraction(2)) for name in ("one", "two", "three")]
    texts = [(0, "a")] * 50 + [(1, "b")] * 25 + [(2, "c")] * 10
    fixed = cured(dataset(texts, *concepts), "B001")
    assert {row.presentations for row in table(fixed)} == {100}
    assert fixed.notes == ("B001 (unbalanced): repeats “one” 2, “two” 4, “three” 10",)


# ---------------------------------------------------------------- with files


def on_disk(folder, images):
    samples = []
    for name, image in images.items():
        path = folder / name
        image.save(path, **({"quality": 40} if name.startswith("poor") else {}))
        status = path.stat()
        file = FilePicture(str(path), read_header(path), status.st_size, status.st_mtime_ns)
        samples.append(Sample(name, file, f"ohwx, {name[0]}"))
    return Dataset(str(folder), (replace(CONCEPT, resolutions=((256, 256),)),), tuple(samples))


def state(folder):
    return {path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat()[:9]) for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    coffee = Image.open(PHOTOS / "coffee.png").convert("RGB").resize((400, 300))
    grey = Image.open(PHOTOS / "astronaut.png").convert("L").convert("RGB").resize((400, 300))
    return on_disk(
        tmp_path, {"a.png": coffee, "b.png": coffee, "c.png": grey, "poor.jpg": grey.crop((0, 60, 300, 300))}
    )


def test_pictures(folder, tmp_path):
    before = state(tmp_path)
    findings = lint(folder, full=True)
    fixed = apply_fixes(folder, findings, ["D030", "T040", "d031"])
    assert state(tmp_path) == before and len(folder.samples) == 4
    kept = {sample.id: sample.caption for sample in fixed.samples}
    tagged = {"c.png": "ohwx, c, monochrome, greyscale", "poor.jpg": "ohwx, p, low quality, monochrome, greyscale"}
    assert kept == {"a.png": "ohwx, a"} | tagged
    assert fixed.notes[0] == "D030 (duplicates): left out 1 image (b.png); files stay"
    assert {"D030", "T040"} & {finding.rule for finding in lint(fixed, full=True)} == set()
    again = apply_fixes(fixed, findings, ["D030", "T040", "D031"])
    assert (again.samples, again.concepts) == (fixed.samples, fixed.concepts)


def test_pictures_that_cannot_be_decoded(folder, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(path.read_bytes()[:3000])
    before = state(tmp_path)
    fixed = apply_fixes(folder, lint(folder, full=True), ["D011"])
    assert [sample.id for sample in fixed.samples] == ["b.png", "c.png", "poor.jpg"] and state(tmp_path) == before
    alone = replace(folder, samples=folder.samples[:1])
    with pytest.raises(DatasetError, match="would leave out all images; replace the files"):
        apply_fixes(alone, lint(alone, full=True), ["D011"])


def test_converted_formats_are_not_left_out():
    data = dataset(["a"])
    data = replace(data, samples=(replace(data.samples[0], picture=picture(0, bits=16)),))
    assert apply_fixes(data, lint(data), ["D011"]).samples == data.samples


# ---------------------------------------------------------------- which rules


def test_several_fixes_at_once():
    data = dataset(["wide_hat, ohwx, wide hat, red car, car", ""], captions=CaptionOptions(trigger="ohwx"))
    findings = lint(data)
    fixed = apply_fixes(data, findings, {"T020", "T002", "T021"})
    assert captions(fixed) == ["ohwx, wide hat, red car", "ohwx"]
    assert [note[:4] for note in fixed.notes] == ["T002", "T020", "T021"]
    assert data.notes == () and captions(data) == ["wide_hat, ohwx, wide hat, red car, car", ""]


def test_nothing_to_fix_is_said():
    data = dataset(["a"])
    fixed = apply_fixes(data, [], FIXABLE)
    assert (fixed.samples, fixed.concepts) == (data.samples, data.concepts)
    assert len(fixed.notes) == len(FIXABLE) and all(note.endswith(": nothing changed") for note in fixed.notes)
    assert apply_fixes(data, lint(data), []) == data


def test_rules_without_a_fix():
    with pytest.raises(
        DatasetError, match="no automatic fix for D021: enlarge with an upscale model.*There are fixes for"
    ):
        apply_fixes(dataset(["a"]), [], ["T002", "D021"])
    with pytest.raises(DatasetError, match=r"'T02' is no lint rule: did you mean T0\d\d \("):
        apply_fixes(dataset(["a"]), [], ["T02"])
    assert "upscale" in RULES["D032"].advice and not RULES["D032"].fix
