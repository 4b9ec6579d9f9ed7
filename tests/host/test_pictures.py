"""Pictures on nodes: bars as long as their shares, lines where the schedules are, grids of what they are given."""

import math

import numpy as np
import pytest
from PIL import Image

from lora_loom.host import pictures
from lora_loom.host.diagnosis import BlockShare
from lora_loom.host.pictures import bar_picture, grid, schedule_picture
from lora_loom.kernels.strengths.schedule import Clock, Schedule, fixed, parse
from lora_loom.training.dataset.sheet import PAGE

BLUE = (56, 189, 248)  # the first line, group, bar


def trunk(values, group="double_blocks"):
    return [BlockShare(f"{group}.{n}", value, 3, "trunk") for n, value in enumerate(values)]


def heights(picture, colour):
    """Of the bars in ``colour``, from the left."""
    mask = (np.asarray(picture)[95:] == colour).all(-1)  # below the legend
    columns = mask.sum(0)
    starts = np.flatnonzero(np.diff(np.concatenate([[0], columns > 0])) == 1)
    # labels and their lines cover some of a bar
    return [int(columns[start : start + 3].max()) for start in starts]


@pytest.mark.parametrize("count", [3, 12, 40, 57, 100])
def test_bars_are_as_high_as_the_shares(count):
    values = np.random.default_rng(count).uniform(0.01, 0.09, count)
    picture = bar_picture(trunk(values), "a LoRA")
    assert 512 <= picture.width <= 1024 and 256 <= picture.height <= 512
    found = np.array(heights(picture, BLUE))
    assert len(found) == count
    assert np.abs(found / found.max() - values / values.max()).max() < 0.02


def test_a_wide_span_is_logarithmic():
    values = [1e-4, 1e-3, 1e-2, 1e-1, 3e-4, 0.0]
    found = heights(bar_picture(trunk(values), ""), BLUE)
    steps = np.diff(found[:4])
    assert np.abs(steps - steps.mean()).max() <= 2 and found[4] - found[0] == pytest.approx(
        steps[0] * math.log10(3), abs=2
    )
    assert found[0] > 5 and found[5] <= 2
    linear = heights(bar_picture(trunk([0.001, 0.05, 0.1]), ""), BLUE)
    assert linear[1] / linear[2] == pytest.approx(0.5, abs=0.02)


def test_groups_have_colours_of_their_own():
    groups = {
        "base": "base",
        "input_blocks": "in",
        "middle_block": "mid",
        "output_blocks": "out",
        "noise_refiner": "aux",
        "context_refiner": "aux",
        "double_blocks": "trunk",
        "single_blocks": "trunk",
    }
    blocks = [BlockShare(f"{group}.{n}", 0.05, 1, role) for group, role in groups.items() for n in range(2)]
    blocks += [BlockShare("base", 0.05, 1, "base"), BlockShare("middle_block", 0.05, 1, "mid")]
    picture = np.asarray(bar_picture(blocks, "all of them"))
    assert len(heights(picture, (96, 165, 250))) == 2
    swatches = {tuple(pixel) for pixel in picture[-120].tolist() if pixel != list(PAGE)}
    assert len(swatches) == len(groups)


def test_the_extremes_carry_their_names():
    values = [0.05] * 30
    plain = np.asarray(bar_picture(trunk(values), "x"))
    values[7], values[20] = 0.09, 0.01
    names = {"double_blocks.7": "the strongest", "double_blocks.20": "the weakest"}
    named, unnamed = (np.asarray(bar_picture(trunk(values), "x", given)) for given in (names, None))
    changed = np.flatnonzero((named != unnamed).any((0, 2)))
    pitch = (plain.shape[1] - 102) / 30
    for place in (7, 20):
        middle = 82 + (place + 0.4) * pitch
        near = changed[np.abs(changed - middle) < 70]
        assert len(near) > 20
    assert all(min(abs(x - 82 - (place + 0.4) * pitch) for place in (7, 20)) < 80 for x in changed)


@pytest.mark.parametrize(
    "values", [[], [0.0], [math.inf, math.nan], [0.1, math.inf], [1e-300, 1.0], [5e-324], [1e30, 1e-30], [0.5] * 500]
)
def test_whatever_there_is_can_be_drawn(values):
    picture = bar_picture(trunk(values), "title\x00\n\ud800 Größe 名前 " * 20, {"double_blocks.0": "n" * 500})
    assert picture.height < 700 and picture.width >= pictures.WIDTH


def line_heights(picture, steps, colour=BLUE):
    """Weight axis in pixels at the middle of each step."""
    mask = (np.asarray(picture)[70:] == colour).all(-1)
    left, right = 82, picture.width - 20
    middles = [round(left + (right - left) * (step + 0.5) / steps) for step in range(steps)]
    return np.array([np.flatnonzero(mask[:, middle]).mean() for middle in middles])


def test_lines_run_as_the_schedules_do():
    sigmas = [*np.geomspace(14.6, 0.03, 12), 0.0]
    parts = {"unet": parse("-0.2@2,1@8,0.3@12", "unet", "linear")}
    picture = schedule_picture(parts, Clock(sigmas), "over the run")
    wanted = np.interp(np.arange(12), [1, 7, 11], [-0.2, 1, 0.3])
    found = line_heights(picture, 12)
    slope, start = np.polyfit(wanted, found, 1)
    assert slope < -50 and np.abs(found - start - slope * wanted).max() < 1.5
    held = line_heights(schedule_picture({"te": parse("0.1@1,0.6@6", "te")}, Clock(sigmas)), 12)
    assert len(set(held[:5])) == len(set(held[5:])) == 1 and held[0] > held[5] + 50


def test_axes_appear_where_they_are_used():
    clock = Clock([4.0, 3.0, 2.0, 1.0, 0.0])
    plain = schedule_picture({"a": parse("0@1,1@3", "a")}, clock)
    fraction = schedule_picture({"a": parse("0@0.0,1@50%", "a")}, clock)
    sigma = schedule_picture({"a": parse("0@s4,1@s2", "a")}, clock)
    both = schedule_picture({"a": parse("0@0.0,1@s2", "a")}, clock)
    constant = schedule_picture({"a": fixed(0.5)}, clock)
    assert plain.height == constant.height
    assert fraction.height == sigma.height == plain.height + 22 and both.height == plain.height + 44
    assert not np.array_equal(np.asarray(fraction), np.asarray(sigma))


@pytest.mark.parametrize("text", ["0@1,1@11", "0@0.0,1@50%", "0@s14,1@s2"])
def test_a_run_that_is_not_known(text):
    parts = {"steps": parse(text, "steps")}
    picture = schedule_picture(parts)
    assert picture.height == schedule_picture(parts, Clock([*np.linspace(20, 1, 20), 0.0])).height + 20  # it is said
    found = line_heights(picture, pictures.STEPS)
    assert found[0] > found[-1] + 50 and len(set(found)) == 2
    if "s" not in text:
        assert list(found > found[-1]) == [True] * 10 + [False] * 10


def test_many_parts_and_odd_runs():
    parts = {f"part {n} " + "x" * 200: parse(f"0@1,{n}@3", "n") for n in range(20)}
    some = {name: parts[name] for name in list(parts)[: pictures.MOST_LINES]}
    clock = Clock([1.0, 0.5, 0.0])
    assert schedule_picture(parts, clock).height == schedule_picture(some, clock).height + 20
    for odd in (Clock([1.0]), Clock([1.0, 0.0]), Clock(np.linspace(1, 0, 1001))):
        picture = schedule_picture({"a": parse("-100@1,100@s0.3", "a", "cosine"), "b": fixed(0.0)}, odd, "名")
        assert picture.size[0] == pictures.WIDTH
    with pytest.raises(ValueError, match="no schedule"):
        schedule_picture({})


def test_equal_lines_show_both():
    clock = Clock(np.linspace(1, 0, 6))
    same: dict[str, Schedule] = {name: parse("0@1,1@3", name) for name in ("a", "b", "c")}
    picture = np.asarray(schedule_picture(same, clock))[70:]
    for colour in pictures._LINES[:3]:
        assert (picture == colour).all(-1).sum() > 500


def test_a_grid_holds_its_pictures():
    colours = [(200, 10 * n, 40) for n in range(7)]
    numbers = [None, 0.1, -0.4, 0.2, 0.8, math.nan, 0.0]
    sizes = [(64, 48), (32, 32), (64, 64), (100, 20), (64, 48), (1, 1), (64, 48)]
    cells = [
        (f"without block {n}", Image.new("RGB", size, colour), number)
        for n, (size, colour, number) in enumerate(zip(sizes, colours, numbers, strict=True))
    ]
    picture = np.asarray(grid(cells, 3, side=100))
    for number, (colour, size) in enumerate(zip(colours, sizes, strict=True)):
        row, column = divmod(number, 3)
        where = np.argwhere((picture == colour).all(-1))
        assert len(where) and tuple(np.ptp(where, 0)[::-1] + 1) == size
        assert 20 + column * 112 <= where[:, 1].min() and where[:, 1].max() < 20 + column * 112 + 100
        assert row == (where[:, 0].mean() - 20) // (picture.shape[0] // 3)
    lengths = []
    mask = (picture == BLUE).all(-1)
    for start in np.flatnonzero(np.diff(np.concatenate([[False], mask.any(1)]).astype(int)) == 1):
        lengths += [mask[start, 20 + c * 112 : 120 + c * 112].sum() for c in range(3)]
    assert lengths[4] == max(lengths)
    assert np.array(lengths[:3]) / lengths[4] == pytest.approx([0, 1 / 8, 1 / 2], abs=0.05)
    assert lengths[3] / lengths[4] == pytest.approx(1 / 4, abs=0.05) and lengths[5] == 0


def test_impossible_grids():
    cell = ("a", Image.new("L", (4, 4)), 1.0)
    assert grid([cell], 5).width == grid([cell], 1).width
    for cells, columns, what in (([], 1, "0 pictures"), ([cell] * 401, 1, "401"), ([cell], 0, "columns is 0")):
        with pytest.raises(ValueError, match=what):
            grid(cells, columns)
