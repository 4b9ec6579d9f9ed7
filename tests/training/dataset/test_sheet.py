"""The contact sheet shows the trained crops themselves: where they are, what they are, and what is written there."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from lora_loom.training.dataset import sheet
from lora_loom.training.dataset.batches import place
from lora_loom.training.dataset.combining import combine
from lora_loom.training.dataset.images import read_header
from lora_loom.training.dataset.model import (
    BucketOptions,
    CaptionOptions,
    Concept,
    Dataset,
    DatasetError,
    FilePicture,
    GraphPicture,
    ImageOptions,
    Sample,
)
from lora_loom.training.dataset.pixels import load
from lora_loom.training.dataset.sheet import CELL, GAP, MARGIN, contact_sheet, wrap

PLAIN = Concept(resolutions=((CELL, CELL),), buckets=BucketOptions(step=16))  # thumbnails are as large as the crops
FIRST_ROW = 46 + 34  # the two headings above it


def smooth(width, height, seed=0):
    """A picture without detail, which survives being scaled."""
    draws = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 3, 3, generator=draws)
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)


def dataset(*sizes, concept=PLAIN, caption="a cat"):
    samples = (Sample(f"{n}.png", GraphPicture(smooth(*size, seed=n)), caption) for n, size in enumerate(sizes))
    return Dataset("set", (concept,), tuple(samples))


def cell(page, column, width=CELL, height=CELL, top=FIRST_ROW):
    left = MARGIN + column * (width + GAP)
    return page[top : top + height, left : left + width]


def test_the_crops_are_those_that_are_trained():
    concept = replace(PLAIN, images=ImageOptions(crop="random"))
    given = dataset((CELL, CELL), (3 * CELL, 2 * CELL), (CELL, CELL), concept=concept)
    items = place(given, ("training",), 1)
    page = contact_sheet(given, seed=7)
    for column, index in enumerate((0, 2)):
        assert torch.allclose(cell(page, column)[30:], load(given, items[index], 0, 7).image[30:], atol=0.6 / 255)
    assert not torch.allclose(cell(page, 0)[30:], cell(page, 1)[30:], atol=0.1)


def test_validation_pictures_are_where_and_what_they_are_in_a_run():
    """Nothing random about them, and none of them fills the bucket of another."""
    images = ImageOptions(crop="random", flip=True, brightness=0.5)
    trained = replace(PLAIN, images=images)
    kinds = ("training", "validation")
    joined = combine([dataset((3 * CELL, 2 * CELL), concept=replace(trained, kind=kind)) for kind in kinds])
    page = contact_sheet(joined)
    [item] = place(joined, ("validation",))
    plain = replace(joined, concepts=(trained, replace(PLAIN, kind="validation")))
    shown = load(plain, item, 0, 0).image
    width, height = sheet._thumbnail_size(item.bucket, page.shape[1])
    small = shown.permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(small, (height, width), mode="area")[0].permute(1, 2, 0)
    assert torch.allclose(cell(page, 1, width, height)[30:], small[30:], atol=0.03)


def test_the_sheet_is_an_image_of_the_graph():
    page = contact_sheet(dataset((CELL, CELL)), columns=3)
    assert page.dtype == torch.float32 and page.ndim == 3 and page.shape[2] == 3
    assert 0 <= float(page.min()) and float(page.max()) <= 1
    assert page.shape[1] == 2 * MARGIN + 3 * CELL + 2 * GAP


def test_random_crops_follow_the_seed():
    given = dataset((CELL, 2 * CELL), concept=replace(PLAIN, buckets=BucketOptions(enabled=False, step=16),
                                                      images=ImageOptions(crop="random")))  # fmt: skip
    pages = [contact_sheet(given, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(pages[0], pages[1]) and not torch.equal(pages[0], pages[2])


def test_groups_are_buckets_and_no_image_is_missing():
    given = dataset(*[(CELL, CELL)] * 3, *[(2 * CELL, CELL)] * 8, (CELL, 3 * CELL))
    seen = []
    contact_sheet(given, advance=lambda: seen.append(1))
    assert len(seen) == 12
    groups = sheet._groups(place(given, ("training",), 1), 100, 1)
    assert [(group.total, len(group.items)) for group in groups] == [(8, 8), (3, 3), (1, 1)]
    assert all(len({item.bucket for item in group.items}) == 1 for group in groups)


@pytest.mark.parametrize("limit", [1, 4, 5, 12, 100])
def test_the_pages_hold_every_image_once(limit):
    items = place(dataset(*[(CELL, CELL)] * 7, *[(2 * CELL, CELL)] * 5), ("training",), 1)
    pages = [sheet._groups(items, limit, page) for page in range(1, -(-12 // limit) + 1)]
    shown = [[item.sample for group in page for item in group.items] for page in pages]
    assert sorted(sum(shown, [])) == list(range(12))
    assert all(len(page) == limit for page in shown[:-1]) and len(shown[-1]) == (12 % limit or limit)
    assert {group.total for page in pages for group in page} == {7, 5}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"limit": 0}, "limit is 0"),
        ({"limit": 10**6}, "limit is 1000000"),
        ({"page": 2}, "page is 2, expected 1 to 1 with a limit of 60"),
        ({"page": 0}, "page is 0"),
        ({"columns": 0}, "columns is 0"),
        ({"columns": 10**6}, "columns is 1000000"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(DatasetError, match=message):
        contact_sheet(dataset((CELL, CELL)), **options)


def test_what_a_mask_hides_is_tinted_and_the_rest_is_not():
    mask = torch.zeros(CELL, CELL, 1)
    mask[:, CELL // 2 :] = 1
    given = dataset((CELL, CELL))
    masked = given.with_samples([replace(given.samples[0], mask=GraphPicture(mask))])
    plain, tinted = cell(contact_sheet(given), 0), cell(contact_sheet(masked), 0)
    assert torch.equal(plain[:, CELL // 2 :], tinted[:, CELL // 2 :])
    expected = plain * (1 - sheet.TINT_STRENGTH) + torch.tensor(sheet.TINT) / 255 * sheet.TINT_STRENGTH
    assert torch.allclose(tinted[:, : CELL // 2], expected[:, : CELL // 2], atol=1.1 / 255)


def has_colour(part, colour):
    return bool((part.sub(torch.tensor(colour) / 255).abs().amax(-1) < 1e-3).any())


def test_kinds_repeats_and_enlargements_are_marked():
    joined = combine(
        [
            dataset((CELL, CELL), concept=replace(PLAIN, repeats=Fraction(3, 2))),
            dataset((CELL, CELL), concept=replace(PLAIN, kind="regularisation")),
            dataset((CELL, CELL), concept=replace(PLAIN, kind="validation")),
            dataset((CELL // 2, CELL // 2)),
            dataset((CELL, CELL)),
        ]
    )
    page = contact_sheet(joined)
    marks = [sheet.REPEATS_MARK, *sheet.MARKS.values(), sheet.ENLARGED_MARK]
    for column in range(5):
        found = [has_colour(cell(page, column)[:24], mark) for mark in marks]
        assert found == [index == column for index in range(4)]


def test_captions_are_those_that_are_trained():
    """Trigger and suffix included, brackets as written, shuffled and dropped nothing."""
    options = CaptionOptions(trigger="zorb", suffix="(painted)", shuffle=True, dropout=1.0, tag_dropout=1.0)
    one = contact_sheet(dataset((CELL, CELL), caption="a cat", concept=replace(PLAIN, captions=options)))
    assert torch.equal(one, contact_sheet(dataset((CELL, CELL), caption="zorb, a cat (painted)")))


def test_captions_stand_below_and_only_there():
    pages = [contact_sheet(dataset((CELL, CELL), caption=text)) for text in ("", "a cat", "a dog")]
    top = FIRST_ROW + CELL
    assert len({page[top:].numpy().tobytes() for page in pages}) == 3
    assert len({page[:top].numpy().tobytes() for page in pages}) == 1
    long = contact_sheet(dataset((CELL, CELL), caption="many words " * 100))
    assert long.shape[0] == pages[0].shape[0] + 2 * sheet.LINE_HEIGHT


# ---------------------------------------------------------------- wrapped text


@pytest.mark.parametrize(
    "text", ["a cat", "one two three " * 20, "x" * 500, "über die Brücke " * 9, "a\nb\n\nc", "\0", "日 " * 30, "\ud800"]
)
def test_wrapped_lines_fit_and_lose_nothing(text):
    font = ImageFont.load_default(13)
    lines = wrap(text, font, 120, 1000)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(sheet.printable(text).split())
    short = wrap(text, font, 120, 2)
    assert len(short) <= 2 and all(font.getlength(line) <= 120 for line in short)
    if len(lines) > 2:
        assert short[0] == lines[0] and short[1].endswith("…") and lines[1].startswith(short[1][:-1])
    else:
        assert short == lines


def test_a_sheet_of_a_picture_in_a_file(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray((smooth(CELL, CELL) * 255).round().byte().numpy()).save(path)
    picture = FilePicture(str(path), read_header(path), path.stat().st_size, path.stat().st_mtime_ns)
    page = contact_sheet(Dataset("x", (PLAIN,), (Sample("a.png", picture, "hello"),)))
    assert np.array_equal((cell(page, 0) * 255).round().byte().numpy(), np.asarray(Image.open(path)))
