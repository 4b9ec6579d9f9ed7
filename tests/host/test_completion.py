"""Completion of tags: the same as a plain scan of the lists finds, in any of their formats, renewed with the files."""

import random

import folder_paths
import pytest

from lora_loom.host import completion
from lora_loom.host.completion import TagLists
from lora_loom.training.dataset.lint_knowledge import plain


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    place = tmp_path / "lora_loom/tags"
    place.mkdir(parents=True)
    return place


DANBOORU = """1girl,0,6008644,"1girls,sole_female"
highres,5,5256195,"high_res,high_resolution,hires"
speed_lines,0,20000,
hatsune_miku,4,110000,"miku_hatsune,初音ミク"
^_^,0,30000,
"a,b",0,3,
"""
E621 = """id,name,category,post_count
1,speed_lines,0,21000
2,red_fox,5,40000
3,"comma, name",0,7
"""


def tags(found):
    return [(each.tag, each.count) for each in found[0]]


def test_any_part_of_a_name_the_most_frequent_first(folder):
    (folder / "danbooru.csv").write_text(DANBOORU)
    lists = TagLists()
    assert tags(lists.complete("eed lin", 10)) == tags(lists.complete("EED_LIN", 10)) == [("speed lines", 20000)]
    assert tags(lists.complete("h", 2)) == [("highres", 5256195), ("hatsune miku", 110000)]
    assert tags(lists.complete("^_^", 9)) == [("^_^", 30000)]
    assert tags(lists.complete("a,b", 9)) == [("a,b", 3)]
    [miku], _ = lists.complete("初音", 9)
    assert (miku.tag, miku.alias, miku.category) == ("hatsune miku", "初音ミク", 4)
    [girl], _ = lists.complete("1girl", 9)
    assert girl.alias == "" and girl.category == 0
    assert lists.complete("", 9) == lists.complete("  ", 9) == lists.complete("no such", 9) == ([], ())


def test_a_boards_export_and_several_lists(folder):
    (folder / "danbooru.csv").write_text(DANBOORU)
    (folder / "e621.CSV").write_bytes(b"\xef\xbb\xbf" + E621.encode())
    lists = TagLists()
    assert tags(lists.complete("speed", 9)) == [("speed lines", 21000)], "once, with the greater count"
    [fox], _ = lists.complete("fox", 9)
    assert (fox.tag, fox.category) == ("red fox", 5)
    assert tags(lists.complete("comma", 9)) == [("comma, name", 7)]


def test_the_same_as_a_plain_scan(folder):
    draws = random.Random(7)
    letters = "abcü_ (1"
    rows, names = {}, {}
    while len(rows) < 3000:
        name = "".join(draws.choices(letters, k=draws.randint(1, 9))).strip(" _") + f"x{len(rows)}"
        rows[name] = draws.randrange(10**6)
        names[name] = [name] + [f"{''.join(draws.choices('abcd', k=4))}y{len(rows)}"] * draws.randrange(2)
    text = "\n".join(f'"{name}",0,{count},"{",".join(names[name][1:])}"' for name, count in rows.items())
    (folder / "mine.csv").write_text(text)
    lists = TagLists()
    for part in ("a", "b1", "x12", "ü a", "cc", "(1", "zz", "abcdy", "y7", "x2999"):
        fits = {name for name, known in names.items() if any(plain(part) in plain(each) for each in known)}
        best = sorted((-rows[name], plain(name)) for name in fits)[:25]
        assert tags(lists.complete(part, 25)) == [(name, -count) for count, name in best]


def test_changes_are_seen_and_faults_told(folder):
    lists = TagLists()
    assert lists.complete("cat", 9) == ([], ())
    (folder / "mine.csv").write_text("cat,0,5\n")
    assert tags(lists.complete("cat", 9)) == [("cat", 5)]
    (folder / "mine.csv").write_text("cat,0,7\ncatfish,0,9\n")
    (folder / "faulty.csv").write_text("cat,0,1\ndog,zero,2\n")
    found, notes = lists.complete("cat", 9)
    assert [(each.tag, each.count) for each in found] == [("catfish", 9), ("cat", 7)]
    assert len(notes) == 1 and notes[0].startswith("faulty.csv, line 2: ")
    (folder / "faulty.csv").unlink()
    assert lists.complete("dog", 9) == ([], ())


def test_hostile_lists_are_bounded(folder, tmp_path, monkeypatch):
    (tmp_path / "secret.csv").write_text("secret,0,9\n")
    (folder / "link.csv").symlink_to(tmp_path / "secret.csv")
    (folder / "tabs.csv").write_text('"one\ttwo three",0,5,"p\tq"\n')
    lists = TagLists()
    assert lists.complete("secret", 9) == ([], ()), "links are not followed"
    assert tags(lists.complete("one two", 9)) == [("one two three", 5)]
    assert tags(lists.complete("e\tt", 9)) == tags(lists.complete("p q", 9)) == [("one two three", 5)]
    monkeypatch.setattr(completion, "LARGEST", 40)
    (folder / "large.csv").write_text("cat,0,5\n" * 9)
    found = lists.complete("cat", 9)
    assert found[0] == [] and found[1][0].startswith("large.csv is left out")
    assert tags(lists.complete("one", 9)) == [("one two three", 5)]


def test_a_list_that_cannot_be_parsed_takes_no_other_with_it(folder):
    """A board's export in which one quotation mark has no partner."""
    rows = "".join(f"{index},tag_number_{index},0,7\n" for index in range(20_000))
    (folder / "e621.csv").write_text(f'id,name,category,post_count\n1,"oops,0,5\n{rows}')
    (folder / "good.csv").write_text("cat,0,100,\n")
    lists = TagLists()
    for _ in range(2):
        found, notes = lists.complete("cat", 9)
        assert [(each.tag, each.count) for each in found] == [("cat", 100)]
        assert len(notes) == 1 and notes[0].startswith("e621.csv: ") and "quotation mark" in notes[0]
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(completion, "_read", read.append)
        lists.complete("ca", 9)
    assert read == [], "not read again at each key"
