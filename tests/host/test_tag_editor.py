"""The Tag Editor in the graph: what is trained is the edited caption, files stay, and every line is accounted for."""

import pytest
import torch

from dataset_graph import dataset_graph, later, loader, put
from graph import GraphError, images, node, training_prompt
from lora_loom.training.dataset.captions import shown
from lora_loom.training.dataset.draws import Draws

PROGRAM = r"""replace pattern "number (\d)" with "the \1" in tags
add "blue sky" where NOT tag:"the 1"
# a note
put trigger "ohwx" first"""


@pytest.fixture
def graph(places):
    return dataset_graph()


def edited(program, **options):
    return node("LoomTagEditor", dataset=["2", 0], program=program, **options)


def captions(dataset):
    return {sample.id: sample.caption for sample in dataset.samples}


def trained(graph, folder, run, program=None):
    prompt = training_prompt("sd15", folder, run, length=2)
    if program is not None:
        prompt["e"] = edited(program)
        prompt["3"]["inputs"]["dataset"] = ["e", 0]
    return graph.run(prompt)["lora"]


def test_the_trainer_learns_from_the_edited_captions(graph, places):
    """To the bit what it learns from a folder whose files say so, and something else than without the edit."""
    folder = images(places / "comfy/input/plain")
    written = images(places / "comfy/input/written")
    for index in range(4):
        sky = "" if index == 1 else ", blue sky"
        (written / f"{index}.txt").write_text(f"ohwx, zorb, the {index}{sky}")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    by_program = trained(graph, "plain", "by-program", PROGRAM)
    by_hand, unedited = trained(graph, "written", "by-hand"), trained(graph, "plain", "unedited")
    assert by_program.keys() == by_hand.keys()
    assert all(torch.equal(by_program[name], by_hand[name]) for name in by_hand)
    assert any(not torch.equal(by_program[name], unedited[name]) for name in unedited)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "files stay as they are"


def test_each_line_is_reported(graph, places):
    put(places, "cats")
    prompt = {
        "2": loader("cats"),
        "e": edited(PROGRAM + '\nremove "numbr 2"'),
        "data": node("Keep", value=["e", 0]),
        "report": node("Keep", value=["e", 1]),
        "given": node("Keep", value=["2", 0]),
    }
    kept = graph.run(prompt)
    assert captions(kept["data"]) == {
        "0.png": "ohwx, zorb, the 0, blue sky",
        "1.png": "ohwx, zorb, the 1",
        "2.png": "ohwx, zorb, the 2, blue sky",
        "3.png": "ohwx, zorb, the 3, blue sky",
    }
    assert captions(kept["given"])["0.png"] == "zorb, number 0"
    assert kept["report"].split("\n") == [
        'replace pattern "number (\\d)" with "the \\1" in tags: 4 images changed',
        'add "blue sky" where NOT tag:"the 1": 3 images changed',
        'put trigger "ohwx" first: 4 images changed',
        'remove "numbr 2": 0 of 4 images changed; no tag there fits “numbr 2”',
        "edited: 4 images by 4 lines of a program; files stay as they are",
    ]
    assert kept["data"].notes[-1] == kept["report"].split("\n")[-1]
    [sample] = [sample for sample in kept["data"].samples if sample.id == "1.png"]
    assert shown(sample.caption, kept["data"].of(sample).captions, Draws(0)) == "ohwx, zorb, the 1"


def test_an_empty_program_changes_nothing(graph, places):
    put(places, "cats")
    prompt = {"2": loader("cats"), "e": edited("\n# nothing yet\n"), "data": node("Keep", value=["e", 0]),
              "report": node("Keep", value=["e", 1]), "given": node("Keep", value=["2", 0])}  # fmt: skip
    kept = graph.run(prompt)
    assert kept["data"] is kept["given"] and kept["report"] == "the program is empty: nothing was edited"


@pytest.mark.parametrize(
    "program, options, message",
    [
        ('add "x"\nremvoe "a"', {}, "program, line 2: “remvoe” is no operation; the nearest is remove"),
        ('remove "zorbs"', {"if_nothing_matches": "error"}, "“remove \"zorbs\"” changes no image; no tag there fits "
         "“zorbs” \\(is “zorb” meant\\?\\): correct or remove the line, or set if_nothing_matches to note"),
        ("add implied", {}, "no implications are known; choose a table of them under implications"),
        ('add "x" where tokens:>3', {}, "tokens: counts with the text encoder's tokenizer; connect clip"),
        ('add "x"', {"if_nothing_matches": "maybe"}, "if_nothing_matches: 'maybe' is unknown; choose one of"),
        ('add "x"', {"implications": "../x.csv"}, "implications: '../x.csv' is no table below a root"),
    ],
)  # fmt: skip
def test_what_is_wrong_reaches_the_graph(graph, places, program, options, message):
    put(places, "cats")
    prompt = {"2": loader("cats"), "e": edited(program, **options), "3": node("Keep", value=["e", 1])}
    with pytest.raises(GraphError, match=message):
        graph.run(prompt)


def test_tokens_findings_and_implications_are_at_hand(graph, places):
    put(places, "cats")
    table = places / "comfy/datasets/implied.csv"
    table.write_text("zorb,creature\n")
    program = (
        'add "long one" where tokens:>4\nadd "few tags" where lint:T011\nadd implied\nadd "pixels" where lint:D021'
    )
    prompt = {
        "1": node("TinySource", family="sd15"),
        "2": loader("cats"),
        "e": edited(program, implications="implied.csv", clip=["1", 1]),
        "data": node("Keep", value=["e", 0]),
    }
    found = captions(graph.run(prompt)["data"])
    assert all(caption.endswith("few tags, creature") for caption in found.values()), found
    graph.run(prompt)
    assert graph.ran == set()
    table.write_text("zorb,beast\n")
    later(table)
    assert all(caption.endswith("few tags, beast") for caption in captions(graph.run(prompt)["data"]).values())
    assert graph.ran == {"e", "data"}, "only what depends on the table"


def test_a_changed_program_runs_the_node_alone(graph, places):
    put(places, "cats")
    prompt = {"2": loader("cats"), "e": edited('add "x"'), "data": node("Keep", value=["e", 0])}
    graph.run(prompt)
    prompt["e"]["inputs"]["program"] = 'add "y"'
    assert captions(graph.run(prompt)["data"])["0.png"] == "zorb, number 0, y"
    assert graph.ran == {"e", "data"}
