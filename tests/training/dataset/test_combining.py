"""Several datasets as one: ids, groups, and what must not be held back and trained on at once."""

import dataclasses

import pytest
import torch

from lora_loom.training.dataset.combining import combine
from lora_loom.training.dataset.model import Concept, Dataset, FilePicture, GraphPicture, Header, Sample


def graph_picture(level):
    return GraphPicture(torch.full((8, 8, 3), level))


def file_picture(path):
    return FilePicture(path, Header(8, 8, "PNG", "RGB"), 1, 1)


def made(*pictures, kind="training", group=0):
    samples = tuple(Sample(f"{index}.png", picture, "a cat") for index, picture in enumerate(pictures))
    return Dataset("there", (Concept(kind=kind, group=group),), samples)


def test_ids_stay_unique_and_groups_apart():
    parts = [made(graph_picture(0.1)), made(graph_picture(0.2), group=1), made(graph_picture(0.3), group=1)]
    both = dataclasses.replace(parts[2], concepts=(*parts[2].concepts, Concept(group=2)))
    combined = combine([parts[0], parts[1], both])
    assert [sample.id for sample in combined.samples] == ["0.png", "2/0.png", "3/0.png"]
    assert [concept.group for concept in combined.concepts] == [0, 1, 2, 3]
    assert [sample.concept for sample in combined.samples] == [0, 1, 2]
    assert len(combined.notes) == 2 and "dataset 3 (there) shares ids" in combined.notes[1]


@pytest.mark.parametrize("picture, other", [(file_picture, "b.png"), (graph_picture, 0.9)])
@pytest.mark.parametrize("kind", ["training", "regularisation"])
def test_a_picture_that_is_held_back_here_and_trained_there_is_named(picture, other, kind):
    one = "a.png" if isinstance(other, str) else 0.5
    held_back = made(picture(one), kind="validation")
    [_, note] = combine([made(picture(other), picture(one), kind=kind), held_back]).notes
    assert note.startswith("1 validation image also trained on, in another of the datasets: 2/0.png; the validation")
    [only_ids] = combine([made(picture(other), kind=kind), held_back]).notes
    assert "shares ids" in only_ids
