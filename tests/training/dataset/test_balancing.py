"""Repeats per concept, equal shares, the table of both, and pictures held back for validation."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.balancing import (
    balanced,
    presentations_per_image,
    rates,
    split_validation,
    table,
    table_lines,
)
from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.dataset.model import Concept, Dataset, DatasetError, FilePicture, GraphPicture, Header, Sample

HEADER = Header(64, 64, "PNG", "RGB")


def made(*concepts):
    """A dataset of (number of pictures, options of the concept)."""
    samples = [
        Sample(f"{index}/{number}", FilePicture("x", HEADER, 1, 1), "", index)
        for index, (count, _) in enumerate(concepts)
        for number in range(count)
    ]
    return Dataset("test", tuple(Concept(**{"resolutions": ((64, 64),), **c}) for _, c in concepts), tuple(samples))


# ---------------------------------------------------------------- balance


def test_the_guide_s_example():
    """Taken literally, its formula gives repeats of 40 and 100, since it counts the epochs twice."""
    dataset = balanced(made((50, {}), (25, {"repeats": Fraction(7)}), (10, {"samples_per_epoch": 3})))
    assert [concept.repeats for concept in dataset.concepts] == [1, 2, 5]
    assert BatchPlan(dataset, 1, 0).presentations() == (50, 50, 50)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 4))
def test_every_concept_is_shown_equally_often(counts, repeats, epoch):
    """Rounded to whole repeats, 50 and 30 pictures would differ by a fifth."""
    concepts = [(count, {"repeats": Fraction(repeats)}) for count in counts]
    dataset = balanced(made(*concepts, (4, {"kind": "regularisation"}), (4, {"kind": "validation"})))
    shown = BatchPlan(dataset, 3, 0).presentations(epoch)
    assert set(shown[:-2]) == {max(counts) * repeats}
    assert shown[-2:] == (sum(shown[:-2]), 0)


def test_weights_are_the_repeats_one_has_given():
    dataset = made((40, {"repeats": Fraction(2)}), (10, {}), (30, {"repeats": Fraction(1, 2)}))
    result = balanced(dataset, weights=True)
    assert [concept.repeats for concept in result.concepts] == [2, 4, Fraction(2, 3)]
    assert BatchPlan(result, 1, 0).presentations() == (80, 40, 20)
    assert balanced(result, weights=False).concepts[2].repeats == Fraction(8, 3)


def test_pictures_count_once_for_each_resolution():
    two = {"resolutions": ((64, 64), (128, 128))}
    dataset = balanced(made((20, {}), (15, two)))
    assert [concept.repeats for concept in dataset.concepts] == [Fraction(3, 2), 1]
    assert BatchPlan(dataset, 1, 0).presentations() == (30, 30)


def test_nothing_is_changed_without_need_or_against_the_wish():
    dataset = made((3, {"repeats": Fraction(2)}), (9, {}), (0, {}))
    assert balanced(dataset, "none") is dataset
    assert balanced(balanced(dataset)) == balanced(dataset) and balanced(dataset).concepts[2] == dataset.concepts[2]
    assert balanced(made((0, {}), (2, {"kind": "validation"}))).concepts[0].repeats == 1
    with pytest.raises(DatasetError, match="balance is 'equal', expected one of none, presentations"):
        balanced(dataset, "equal")


# ---------------------------------------------------------------- rates and the table


def test_rates():
    dataset = made(
        (4, {"repeats": Fraction(5, 2)}),
        (6, {"samples_per_epoch": 9}),
        (10, {"kind": "regularisation", "repeats": Fraction(2)}),
        (20, {"kind": "regularisation"}),
        (5, {"kind": "validation"}),
    )
    # 10 + 9 presentations, shared 10 · 2 to 20 · 1
    assert rates(dataset) == (Fraction(5, 2), Fraction(3, 2), Fraction(19, 20), Fraction(19, 40), 0)
    assert rates(made((3, {"kind": "regularisation", "repeats": Fraction(2)}))) == (2,), "nobody to keep up with"


def test_the_table_is_what_an_epoch_shows():
    dataset = made(
        (50, {"name": "a", "repeats": Fraction(2)}),
        (25, {"name": "b", "resolutions": ((64, 64), (96, 96)), "repeats": Fraction(1, 3)}),
        (7, {"name": "people", "kind": "regularisation"}),
        (1, {"kind": "validation"}),
    )
    assert table_lines(dataset) == [
        "a: 50 images × 2 = 100 presentations per epoch (43%)",
        "b: 25 images × 0.3333 × 2 resolutions = 16.67 presentations per epoch (7%)",
        "people (regularisation): 7 images × 16.67 = 116.7 presentations per epoch (50%)",
        "images (validation): 1 image, never trained",
    ]
    assert presentations_per_image(dataset) == Fraction(350, 3) / 75, "of training pictures"
    assert presentations_per_image(made((3, {"kind": "regularisation"}))) == 0
    rows, plan = table(dataset), BatchPlan(dataset, 2, 0)
    assert sum(row.share for row in rows) == 1
    epochs = [plan.presentations(epoch) for epoch in range(3)]
    assert [sum(column) for column in zip(*epochs, strict=True)] == [3 * row.presentations for row in rows]


# ---------------------------------------------------------------- held back


@pytest.fixture
def files(tmp_path):
    """A dataset of files by name and content, all concepts given."""

    def put(contents, *concepts):
        samples = []
        for name, (content, concept) in contents.items():
            path = tmp_path / name
            path.write_text(content)
            samples.append(Sample(name, FilePicture(str(path), HEADER, 1, 1), "a cat", concept))
        return Dataset("test", concepts or (Concept(name="cats", repeats=Fraction(3)),), tuple(samples))

    return put


def held(dataset):
    return {sample.id for sample in dataset.samples if dataset.of(sample).kind == "validation"}


@pytest.mark.parametrize("count", [2, 3, 5, 10, 20, 33])
@pytest.mark.parametrize("part", [0.01, 0.05, 0.1, 0.15, 0.2, 0.5, 0.99])
def test_the_part_is_exact_and_both_sides_are_apart(files, count, part):
    """Peers round one side up and the other to the nearest: in 151 of 330 such cases a picture is on both sides."""
    dataset = files({str(i): (f"picture {i}", 0) for i in range(count)})
    result = split_validation(dataset, part, 0)
    assert len(held(result)) == min(max(int(part * count + 0.5), 1), count - 1)
    assert [sample.id for sample in result.samples] == [sample.id for sample in dataset.samples]
    assert result.concepts[0] == replace(dataset.concepts[0], validation_split=part) and len(result.concepts) == 2
    twin = result.concepts[1]
    assert (twin.kind, twin.repeats, twin.name, twin.images) == ("validation", 1, "cats", dataset.concepts[0].images)
    assert f"{len(held(result))} image" in result.notes[-1]
    shown = {result.samples[item.sample].id for item in BatchPlan(result, 2, 0).items}
    assert shown.isdisjoint(held(result)) and len(shown) + len(held(result)) == count


def test_the_seed_decides_and_nothing_else(files):
    """Peers draw anew at every start unless a seed is set: 4 of 4 validation pictures were trained."""
    contents = {str(i): (f"picture {i}", 0) for i in range(20)}
    first = held(split_validation(files(contents), 0.2, 0))
    assert first == held(split_validation(files(contents), 0.2, 0)), "again"
    renamed = {f"other {name}": content for name, content in reversed(contents.items())}
    assert {name.split()[1] for name in held(split_validation(files(renamed), 0.2, 0))} == first
    assert len({frozenset(held(split_validation(files(contents), 0.2, seed))) for seed in range(6)}) > 4


@pytest.mark.parametrize("more", range(5))
def test_a_new_picture_moves_at_most_one_across(files, more):
    contents = {str(i): (f"picture {i}", 0) for i in range(20)}
    before = held(split_validation(files(contents), 0.2, 0))
    after = held(split_validation(files({**contents, "new": (f"new {more}", 0)}), 0.2, 0))
    assert len(before - after) <= 1 and after - before <= {"new"}


def test_copies_stay_together(files):
    contents = {f"{i} {copy}": (f"picture {i}", copy) for i in range(12) for copy in range(2 + (i % 3 == 0))}
    concepts = Concept(name="a"), Concept(name="b"), Concept(name="reg", kind="regularisation")
    for seed in range(8):
        result = split_validation(files(contents, *concepts), 0.25, seed)
        sides = {name.split()[0] for name in held(result)}
        assert held(result) == {f"{i} {copy}" for i in sides for copy in range(2)}
        assert len(sides) == 3 and not any(int(i) % 3 == 0 for i in sides), "those are regularisation too"
        kinds = Counter(result.concepts[sample.concept].name for sample in result.samples if sample.id in held(result))
        assert kinds == {"a": 3, "b": 3} and [concept.name for concept in result.concepts] == [
            "a",
            "b",
            "reg",
            "a",
            "b",
        ]


def test_copies_come_before_the_exact_part(files):
    pairs = {f"{i}{copy}": (f"picture {i}", 0) for i in range(6) for copy in "ab"}
    assert len(held(split_validation(files(pairs), 0.25, 0))) == 2, "3 is what 0.25 asks for, but no pair is split"
    assert len(held(split_validation(files(pairs), 0.01, 0))) == 2, "at least one, so its copy too"


def test_what_cannot_be_split_is_noted(files):
    same = {"a": ("x", 0), "b": ("x", 0)}
    result = split_validation(files(same), 0.5, 0)
    assert held(result) == set()
    assert result.concepts == (Concept(name="cats", repeats=Fraction(3), validation_split=0.5),)
    assert result.notes == (
        "nothing held back for validation of cats: its pictures are copies of each other or of regularisation",
    )
    one = files({"a": ("x", 0)})
    assert split_validation(one, 0.5, 0) is one
    none = files({"a": ("x", 0), "b": ("y", 0)})
    assert split_validation(none, 0.0, 0) is none


def test_pictures_from_the_graph_go_by_their_pixels():
    pixels = [torch.full((4, 4, 3), value) for value in (0.1, 0.2, 0.1, 0.3)]
    samples = tuple(Sample(str(i), GraphPicture(pixel), "") for i, pixel in enumerate(pixels))
    for seed in range(6):
        result = held(split_validation(Dataset("test", (Concept(),), samples), 0.5, seed))
        assert result in ({"0", "2"}, {"1", "3"})


def test_faults_of_the_split_are_named(files):
    for part in (1.0, -0.1, float("nan")):
        with pytest.raises(DatasetError, match="validation part is .* expected 0 .* to below 1"):
            split_validation(files({"a": ("x", 0)}), part, 0)
    gone = made((3, {}))
    with pytest.raises(DatasetError, match=r"x cannot be read \(No such file or directory\): check the file"):
        split_validation(gone, 0.5, 0)
