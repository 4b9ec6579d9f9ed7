"""What a run says and refuses before its first step, through the nodes."""

import json
from pathlib import Path

import folder_paths
import pytest
import torch

import tiny
from graph import Graph, GraphError, images, node, training_prompt
from lora_loom.host import session
from lora_loom.host.loan import Loan


@pytest.fixture(scope="module")
def graph():
    images(Path(folder_paths.get_input_directory()) / "preflight")
    return Graph()


def train(graph, run_name, family="sd15", **run):
    prompt = training_prompt(family, "preflight", run_name, run=["7", 0])
    return graph.run({**prompt, "7": node("LoomRunSettings", **run)})


def test_the_report_has_memory_steps_and_time(graph):
    report = train(graph, "told")["report"]
    assert "expected memory: base weights " in report and " are free" in report and "activations " in report
    assert "expected length: 3 steps, 1.5 passes over the data set, each image shown 1.5 times, about " in report
    quiet = train(graph, "not told", smoke_test=False)["report"]
    assert "expected" not in quiet


def test_it_changes_nothing_of_what_is_learned(graph):
    with_it, without = (train(graph, f"same {on}", smoke_test=on) for on in (True, False))
    assert with_it["loss_map"] == without["loss_map"]
    assert all(torch.equal(tensor, without["lora"][key]) for key, tensor in with_it["lora"].items())


def test_loans_ask_for_what_was_measured(graph, monkeypatch):
    asked = []
    take = Loan.take
    monkeypatch.setattr(Loan, "take", lambda self: asked.append(self.memory_required) or take(self))
    for run in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "offload_activations": True}):
        train(graph, f"asked {len(asked)}", **run)
    guessed, measured = asked[::2], asked[1::2]
    assert len(asked) == 6 and guessed[0] > measured[0] > measured[1] > measured[2] > 0


@pytest.mark.parametrize("wanted, dtype", (("bf16", torch.bfloat16), ("fp16", torch.float16)))
def test_the_model_computes_in_what_the_run_asks_for(graph, monkeypatch, wanted, dtype):
    seen, trainers = set(), []
    original = session.Trainer

    def watched(*args, **kwargs):
        trainers.append(original(*args, **kwargs))
        return trainers[-1]

    monkeypatch.setattr(session, "Trainer", watched)
    take = Loan.take

    def watching(self):
        take(self)
        layer = self.model.get_submodule("diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2")
        layer.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))

    monkeypatch.setattr(Loan, "take", watching)
    kept = train(graph, f"computes {wanted}", compute_dtype=wanted)
    assert seen == {dtype} and trainers[0].scaler.is_enabled() == (dtype is torch.float16)
    assert all(tensor.dtype == torch.float32 for tensor in kept["lora"].values())
    assert json.loads(kept["lora"].metadata["loom.recipe"])["run"]["compute_dtype"] == wanted


def test_a_model_whose_gradients_break_is_refused_before_anything_is_kept(graph, monkeypatch):
    class Detached(torch.nn.Module):
        def forward(self, x):
            return x.detach()

    def broken(family):
        patcher = tiny.tiny(family, inference=True)
        patcher.model.diffusion_model.out[1] = Detached()
        return patcher

    monkeypatch.setattr("graph.tiny_model", broken)
    with pytest.raises(GraphError, match="diffusion_model.out.1 stops the gradient"):
        Graph().run(training_prompt("sd15", "preflight", "broken"))
    assert not (Path(folder_paths.get_output_directory()) / "lora_loom" / "broken" / "lora.safetensors").exists()
