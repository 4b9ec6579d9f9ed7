"""Which file a name in a prompt means."""

import random
import time
import unicodedata

import pytest

from lora_loom.kernels.strengths.lookup import find_name

NAMES = [
    "cat.safetensors",
    "style/Ink Wash.safetensors",
    "style\\line_art-v2.safetensors",
    "sdxl/portrait.safetensors",
    "sd15/portrait.safetensors",
    "sdxl/people/old_man.safetensors",
    "wan/walk_high_noise.safetensors",
    "wan/walk_low_noise.safetensors",
    "v1.5/Detail.Tweaker.v1.5.safetensors",
    "CAT_girl.safetensors",
]


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        ("cat.safetensors", 0),
        ("cat", 0),  # though CAT_girl has the word too
        (" cat.SAFETENSORS ", 0),
        ("style/Ink Wash", 1),
        ("style\\Ink Wash.safetensors", 1),
        ("Ink Wash", 1),
        ("ink_wash", 1),
        ("STYLE/ink-wash", 1),
        ("style/line_art-v2", 2),
        ("Line Art V2", 2),
        ("sdxl/portrait", 3),
        ("sd15\\portrait", 4),
        ("people/old_man", 5),
        ("sdxl/man old", 5),
        ("SDXL/old man", 5),
        ("man old", 5),
        ("sdxl people man", 5),
        ("walk high", 6),
        ("noise low", 7),
        ("Detail.Tweaker.v1.5", 8),
        ("detail tweaker", 8),
        ("CAT_girl", 9),
        ("girl", 9),
    ],
)
def test_found(wanted, number):
    assert find_name(wanted, NAMES) == NAMES[number]
    assert find_name(wanted, NAMES[::-1]) == NAMES[number]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("portrait", "any of 2 LoRAs: sdxl/portrait.safetensors, sd15/portrait.safetensors; write more of the name"),
        ("elsewhere/Portrait", "there is no LoRA 'elsewhere/Portrait' in the loras folders; the nearest: "),
        ("moved/to/another/old_man", "the nearest: sdxl/people/old_man.safetensors"),
        ("walk noise", "wan/walk_high_noise.safetensors, wan/walk_low_noise.safetensors"),
        ("protrait", "there is no LoRA 'protrait' in the loras folders; the nearest: "),
        ("ink wish", "the nearest: style/Ink Wash.safetensors"),
        ("zzz", "; there are 10 others"),
        ("", "there is no LoRA ''"),
        ("  ", "there is no LoRA"),
        ("/", "there is no LoRA '/'"),
        (".safetensors", "there is no LoRA '.safetensors'"),
        ("style/", "there is no LoRA 'style/'"),
        ("x" * 301, "301 letters long, expected at most 300"),
    ],
)
def test_not_found_or_not_sure(wanted, said):
    with pytest.raises(ValueError, match="LoRA") as error:
        find_name(wanted, NAMES)
    assert said in str(error.value)


def test_a_whole_name_comes_before_the_end_of_another():
    assert find_name("cat", ["a/tomcat.safetensors", "b/cat.safetensors"]) == "b/cat.safetensors"
    assert find_name("c/cat", ["abc/cat.safetensors", "b/c/cat.safetensors"]) == "b/c/cat.safetensors"


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("art", "party_dress"),
        ("art", "smart"),
        ("cat", "concatenated_style"),
        ("cat", "tomcat"),
        ("a", "cat"),
        ("cat v2", "cat_v20"),
        ("cat v2", "cat_v1_2"),
        ("cat v1", "cat_v1.5"),
        ("cat 2", "cat_v12"),
        ("cat 5", "cat_v1.5"),
        ("cat 1.5", "cat_v11.5"),
        ("line art", "outline_artist"),
        ("flux/cat", "sdxl/cat"),
        ("flux/cat", "my_flux/cat"),
        ("flux/cat", "flux cat"),
        ("flux/cat", "cat/flux"),
        ("flux/cat flux", "flux/cat"),
        ("../cat", "cat"),
        ("../cat", "style/cat"),
        ("/cat", "cat"),
        ("./cat", "cat"),
        ("a//cat", "a/cat"),
    ],
)
def test_neither_parts_of_words_nor_other_folders(wanted, name):
    with pytest.raises(ValueError, match="there is no LoRA"):
        find_name(wanted, [f"{name}.safetensors"])
    assert find_name(wanted, [f"{name}.safetensors", f"{wanted}.safetensors"]) == f"{wanted}.safetensors"


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("cat", "catGirl"),
        ("girl", "style/CatGirl2"),
        ("cat", "cat2"),
        ("cat v2", "myCatV2_final"),
        ("cat 2", "cat_v2"),
        ("lora", "myLoRA-cat"),
        ("tweaker 1.5", "detailTweaker_v1.5"),
        ("v1.5", "detailTweaker_v1.5"),
        ("2.5d", "anime-2.5D-style"),
        ("[cat]", "big (cat)"),
        ("STRASSE", "Straße bei Nacht"),
        ("кот", "большой кот"),
        ("flux/cat", "FLUX/animals/my_cat"),
        ("animals\\cat", "flux/animals/my_cat"),
    ],
)
def test_whole_words(wanted, name):
    others = ["dog.safetensors", "sdxl/concatenate.safetensors"]
    assert find_name(wanted, [*others, f"{name}.safetensors"]) == f"{name}.safetensors"
    assert find_name(wanted, [f"{name}.safetensors".replace("/", "\\"), *others])


@pytest.mark.parametrize("wanted", ["café", "CAFÉ", "petit café", "style/Café"])
def test_accents_in_one_sign_or_two(wanted):
    ways = ("NFC", "NFD")
    for one, other in [(one, other) for one in ways for other in ways]:
        stem = "petit_café" if "petit" in wanted else "café"
        name = unicodedata.normalize(one, f"style/{stem}.safetensors")
        assert find_name(unicodedata.normalize(other, wanted), [name, "style/caf.safetensors"]) == name


def test_words_as_the_borders_of_random_names_have_them():
    """By the names' making: words go in, in any writing, and just these come out."""
    draw = random.Random(3)
    words = ["ink", "cat", "art", "line", "wash", "neon", "tom", "part", "out", "concat"]
    for _ in range(500):
        inside = draw.sample(words, 3)
        capitals = "".join(map(str.capitalize, inside))
        name = draw.choice(["_".join(inside), "-".join(inside), ". ".join(inside), capitals])
        asked = draw.sample(words, 2)
        try:
            found = find_name(" ".join(asked), [f"{name}{draw.choice(['', '2', '_v3.1'])}.safetensors"])
        except ValueError:
            found = ""
        assert bool(found) == (set(asked) <= set(inside)), (asked, name)


def test_at_most_eight_candidates():
    many = [f"folder{number}/same.safetensors" for number in range(30)]
    with pytest.raises(ValueError, match="any of 30 LoRAs") as error:
        find_name("same", many)
    assert str(error.value).count("folder") == 8
    with pytest.raises(ValueError, match="there are none"):
        find_name("same", [])


def test_every_name_finds_itself_in_all_its_spellings():
    draw = random.Random(0)
    words = ["ink", "wash", "v2", "XL", "detail", "neon", "lora", "old man", "1.5"]
    names = sorted({"/".join("_".join(draw.sample(words, 2)) for _ in range(3)) + ".safetensors" for _ in range(200)})
    for name in names:
        plain = name.removesuffix(".safetensors")
        for wanted in (name, plain, plain.replace("/", "\\")):
            assert find_name(wanted, names) == name


def test_many_names_take_no_time():
    names = [f"folder {n % 40}/file number {n} of_many.safetensors" for n in range(10_000)]
    begin = time.process_time()
    with pytest.raises(ValueError, match="there is no LoRA"):
        find_name("flie nmuber x" * 20, names)
    assert time.process_time() - begin < 30
    odd = ["a1" * 120 + f"{n}.safetensors" for n in range(2000)]
    begin = time.process_time()
    with pytest.raises(ValueError, match="may be any of 2000 LoRAs"):
        find_name("a1" * 100 + " " + "1a" * 40, odd)
    assert time.process_time() - begin < 30
