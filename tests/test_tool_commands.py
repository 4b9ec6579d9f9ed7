"""The LoRA tools on the command line: in real processes, from a copied archive in an odd folder, and in this one.

Checkpoints are made here, with the layers and names of SD1 and SDXL at tiny widths.
"""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from lora_loom.kernels import safetensors_io
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.safetensors_io import TensorFile, load_tensors, save_tensors
from lora_loom.kernels.tools import command_line
from lora_loom.kernels.tools.checkpoint import Checkpoint
from lora_loom.kernels.tools.command_line import main
from lora_loom.kernels.tools.convert import in_precision
from lora_loom.kernels.writing import to_tensors, write_lora

ROOT = Path(__file__).resolve().parent.parent
WIDE, TEXT = 24, 16
BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"


def weights(seed=0, text=True):
    """Some layers of a checkpoint of SD1, by their names there."""
    draws = torch.Generator().manual_seed(seed)
    shapes = {
        "model.diffusion_model.time_embed.0.weight": (WIDE, WIDE),
        "model.diffusion_model.time_embed.0.bias": (WIDE,),
        "model.diffusion_model.input_blocks.0.0.weight": (WIDE, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (WIDE, WIDE, 3, 3),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.bias": (WIDE,),
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": (WIDE,),
        **{f"{BLOCK}.attn{n}.to_{part}.weight": (WIDE, TEXT if n == 2 and part in "kv" else WIDE)
           for n in (1, 2) for part in "qkv"},
        f"{BLOCK}.ff.net.2.weight": (WIDE, 4 * WIDE),
        "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
    }  # fmt: skip
    if text:
        layers = "cond_stage_model.transformer.text_model.encoder.layers.0"
        shapes |= {f"{layers}.self_attn.{part}_proj.weight": (TEXT, TEXT) for part in "qkv"}
        shapes |= {f"{layers}.mlp.fc1.weight": (4 * TEXT, TEXT), f"{layers}.mlp.fc1.bias": (4 * TEXT,)}
    return {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}


def adapters_for(base, family="LoRA", seed=0, rank=2, only=lambda path: True, **options):
    found = {}
    for number, (path, shape) in enumerate(base.table.shapes.items()):
        if len(shape) > 1 and only(path):
            draws = torch.Generator().manual_seed(100 * seed + number)
            how = Options(rank=rank, alpha=rank, block_size=4, **options)
            fresh = make_adapter(family, shape, how, draws, base.weight(path))
            moved = {key: t + 0.2 * torch.randn(t.shape, generator=draws) for key, t in fresh.tensors.items()}
            found[path] = fresh.with_tensors(moved)
    return found


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    save_tensors(weights(), path, {"modelspec.architecture": "stable-diffusion-v1"})
    return Checkpoint(path)


@pytest.fixture
def loras(tmp_path, base):
    """Two files, and what their layers change."""
    found = []
    for seed in (1, 2):
        adapters = adapters_for(base, seed=seed, rank=seed + 1)
        path = tmp_path / f"lora-{seed}.safetensors"
        save_tensors(to_tensors(LoRAFile(adapters, names=base.table)), path, {"modelspec.title": f"lora {seed}"})
        found.append((path, adapters))
    return found


def run(*arguments):
    return main([str(argument) for argument in arguments])


def deltas(path, base):
    file = read_lora(path, base.table)
    assert not file.unplaced
    return {where: adapter.difference(base.weight(where)) for where, adapter in file.adapters.items()}


# -- in processes of their own


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packs") / "any näme (2)"
    folder.mkdir()
    for part in ("__init__.py", "run.py"):
        shutil.copy(ROOT / part, folder / part)
    for part in ("kernels", "training"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def process(folder, *arguments):
    command = [sys.executable, str(folder / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder.parent)


def test_from_an_archive_in_an_odd_folder(odd_folder, loras, base, tmp_path):
    (one, first), (two, second) = loras
    out = tmp_path / "somewhere else" / "merged.safetensors"
    merging = ("merge", one, two, "--strengths", "0.5", "-0.25", "--out", out, "--precision", "float32")
    done = process(odd_folder, *merging)
    assert done.returncode == 0, done.stderr
    assert "all of the energy retained" in done.stdout and not done.stderr
    for path, change in deltas(out, base).items():
        torch.testing.assert_close(change, 0.5 * first[path].delta() - 0.25 * second[path].delta())
    again = process(odd_folder, *merging)
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr == f"error: {out} is there already; give another --out, or --overwrite\n"
    found = process(odd_folder, "inspect", out, one, "--json")
    told = json.loads(found.stdout)
    assert [row["name"] for row in told] == ["merged.safetensors", "lora-1.safetensors"]
    assert [parent["strength"] for parent in told[0]["made_by"]["parents"]] == ["0.5", "-0.25"]
    assert process(odd_folder, "merge", one).returncode == 2  # --out is missing


def test_inspect_needs_no_more_than_the_file(odd_folder, loras):
    found = process(odd_folder, "inspect", loras[0][0])
    assert found.returncode == 0 and "LoRA; rank 2, alpha 2" in found.stdout


# -- merge


def test_strengths_of_components_and_blocks(loras, base, tmp_path, capsys):
    (one, first), _ = loras
    out = tmp_path / "out.safetensors"
    assert run("merge", one, "--strengths", "0.5:te=0.2:blocks=IN01=0", "--out", out, "--base", base.file.path) == 0
    found = deltas(out, base)
    for path, adapter in first.items():
        if ".input_blocks.1." in path:
            assert path not in found
        else:
            factor = 0.2 if path.startswith("clip_l") else 0.5
            torch.testing.assert_close(found[path], factor * adapter.delta(), rtol=1e-4, atol=1e-6)
    assert run("merge", one, "--strengths", "0.5:in=0", "--out", tmp_path / "x.safetensors") == 1
    assert "--strengths: lora-1.safetensors: blocks need the model" in capsys.readouterr().err
    assert run("merge", one, "--strengths", "1", "2", "--out", tmp_path / "x.safetensors") == 1
    assert "--strengths: 2 for 1 files" in capsys.readouterr().err


def test_te_by_number_without_a_base(loras, base, tmp_path):
    (one, first), _ = loras
    out = tmp_path / "out.safetensors"
    assert run("merge", one, "--strengths", "1:te1=0", "--out", out) == 0
    assert deltas(out, base).keys() == {path for path in first if path.startswith("diffusion_model.")}


def test_the_best_approximation_of_the_sum(loras, base, tmp_path):
    (one, first), (two, second) = loras
    out = tmp_path / "out.safetensors"
    assert run("merge", one, two, "--method", "sum", "--rank", "3", "--out", out) == 0
    for path, change in deltas(out, base).items():
        total = (first[path].delta() + second[path].delta()).flatten(1).double()
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        torch.testing.assert_close(change.flatten(1).double(), (u[:, :3] * s[:3]) @ v[:3], rtol=1e-3, atol=1e-4)


def test_what_depends_on_the_weights_reads_them_from_the_base(base, tmp_path, capsys):
    adapters = adapters_for(base, "OFT", only=lambda path: "attn1" in path)
    given, out = tmp_path / "oft.safetensors", tmp_path / "out.safetensors"
    save_tensors(to_tensors(LoRAFile(adapters, names=base.table)), given)
    assert run("merge", given, "--strengths", "0.5", "--out", out) == 1
    assert "give the model that it is for" in capsys.readouterr().err and not out.exists()
    assert run("merge", given, "--strengths", "0.5", "--out", out, "--base", base.file.path) == 0
    for path, change in deltas(out, base).items():
        torch.testing.assert_close(change, 0.5 * adapters[path].difference(base.weight(path)), rtol=1e-3, atol=1e-5)


def test_what_is_at_0_brings_nothing_along(base, tmp_path, capsys):
    files = []
    for seed, word in enumerate(("cat", "dog")):
        file = LoRAFile(
            adapters_for(base, seed=seed),
            {"modelspec.trigger_phrase": word},
            embeddings={word: {"clip_l": torch.ones(2, TEXT)}},
            names=base.table,
        )
        files.append(write_lora(file, tmp_path / f"{word}.safetensors"))
    out = tmp_path / "out.safetensors"
    assert run("merge", *files, "--strengths", "1", "0", "--out", out) == 0
    made = load_tensors(out)
    assert {key for key in made if "bundle_emb" in key} == {"bundle_emb.cat.clip_l"}
    assert made.metadata["modelspec.trigger_phrase"] == "cat" and "modelspec.merged_from" not in made.metadata
    assert "dog.safetensors: its strength is 0, nothing of it is in the result" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"dora": "output"}])
def test_as_given_is_what_the_factors_are(dtype, options, base, tmp_path):
    """Alphas and norms are float32 in files of every precision."""
    adapters = adapters_for(base, only=lambda path: "attn" in path, **options)
    file = in_precision(LoRAFile(adapters, names=base.table), dtype)[0]
    given, out = write_lora(file, tmp_path / "given.safetensors"), tmp_path / "out.safetensors"
    assert {tensor.dtype for tensor in load_tensors(given).values()} == {dtype, torch.float32}
    for command in (("resize", given, "--rank", "1"), ("merge", given, given, "--strengths", "0.5", "0.5"),
                    ("convert", given, "--plain")):  # fmt: skip
        assert run(*command, "--base", base.file.path, "--out", out, "--overwrite") == 0
        wide = {key for key, tensor in load_tensors(out).items() if tensor.numel() > 1 and tensor.dtype != dtype}
        assert all(key.endswith(".dora_scale") for key in wide)


# -- extract


@pytest.mark.parametrize("form", ["checkpoint", "diffusion model", "half precision"])
def test_a_known_lora_is_found_again(form, base, tmp_path, capsys):
    adapters = adapters_for(base, rank=3)
    tuned = {name: tensor.clone() for name, tensor in weights().items()}
    for path, adapter in adapters.items():
        key = base._places[f"{path}.weight"].name
        tuned[key] = adapter.merged(tuned[key])
    tuned["model.diffusion_model.time_embed.0.bias"] += 1
    before = base.file.path
    if form == "diffusion model":
        tuned, plain = ({n.removeprefix("model.diffusion_model."): t for n, t in each.items() if "diffusion" in n}
                        for each in (tuned, weights()))  # fmt: skip
        before = tmp_path / "plain.safetensors"
        save_tensors(plain, before)
    if form == "half precision":
        tuned = {name: tensor.half() for name, tensor in tuned.items()}
    after, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    save_tensors(tuned, after)
    assert run("extract", after, before, "--energy", "0.99999", "--out", out, "--precision", "float32") == 0
    said = capsys.readouterr().out
    assert ("text encoders: there are none" in said) == (form == "diffusion model")
    found = read_lora(out, base.table)
    expected = {path for path in adapters if form != "diffusion model" or path.startswith("diffusion_model.")}
    assert expected <= found.adapters.keys()
    for path in expected:
        change, wanted = found.adapters[path].difference(base.weight(path)), adapters[path].delta()
        assert (change - wanted).norm() / wanted.norm() < (2e-2 if form == "half precision" else 1e-3), path
    bias = found.adapters["diffusion_model.time_embed.0"].merged_bias(torch.zeros(WIDE))
    torch.testing.assert_close(bias, torch.ones(WIDE), rtol=0, atol=2e-3)


def test_checkpoints_of_eight_bits(base, tmp_path):
    """As they are extracted from, and as the base of what depends on the weights."""
    eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights().items()}
    change = {name: torch.randn(tensor.shape) for name, tensor in weights().items()}
    tuned = {name: (tensor.float() + change[name]).to(torch.float8_e4m3fn) for name, tensor in eight.items()}
    before, after, out = (tmp_path / f"{name}.safetensors" for name in ("before", "after", "out"))
    save_tensors(eight, before)
    save_tensors(tuned, after)
    assert run("extract", after, before, "--energy", "1", "--out", out, "--precision", "float32") == 0
    name = f"{BLOCK}.attn1.to_q"
    wanted = tuned[f"{name}.weight"].float() - eight[f"{name}.weight"].float()
    found = deltas(out, base)[name.removeprefix("model.")]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    given, plain = tmp_path / "dora.safetensors", tmp_path / "plain.safetensors"
    adapters = adapters_for(base, only=lambda path: "attn1.to_q" in path, dora="output")
    save_tensors(to_tensors(LoRAFile(adapters, names=base.table)), given)
    assert run("convert", given, "--plain", "--energy", "1", "--base", before, "--out", plain) == 0
    ((path, adapter),) = adapters.items()
    wanted = adapter.difference(eight[f"{name}.weight"].float())
    torch.testing.assert_close(deltas(plain, base)[path], wanted, rtol=1e-3, atol=1e-4)


def test_parts_can_be_left_out_and_sizes_asked_for(base, tmp_path, capsys):
    tuned = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in weights().items()}
    after = tmp_path / "tuned.safetensors"
    save_tensors(tuned, after)
    out = tmp_path / "out.safetensors"
    assert run("extract", after, base.file.path, "--average-rank", "2", "--no-conv", "--no-text", "--out", out) == 0
    found = read_lora(out, base.table).adapters
    assert not any(path.startswith("clip_l") for path in found)
    assert all(max(base.table.shapes[path][2:], default=1) == 1 for path in found)
    assert {tensor.dtype for key, tensor in load_tensors(out).items() if "lora" in key} == {torch.float16}
    assert run("extract", after, base.file.path, "--out", tmp_path / "x.safetensors") == 1
    assert "give either --rank" in capsys.readouterr().err
    assert run("extract", base.file.path, base.file.path, "--rank", "2", "--out", tmp_path / "x.safetensors") == 1
    assert "the same in both models" in capsys.readouterr().err


def test_other_architectures_and_files_that_are_no_models(base, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    save_tensors({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, other)
    assert run("extract", other, base.file.path, "--rank", "2", "--out", tmp_path / "x.safetensors") == 1
    assert "different architectures" in capsys.readouterr().err
    for tensors, why in (
        ({"unet.down_blocks.0.x.weight": torch.zeros(2, 2)}, "as diffusers calls them"),
        ({"a.b.weight": torch.zeros(2, 2), "a.b.scale_weight": torch.zeros(1)}, "its weights are quantised"),
        ({"first_stage_model.a.weight": torch.zeros(2, 2)}, "there is no diffusion model in it"),
    ):
        save_tensors(tensors, other)
        with pytest.raises(ValueError, match=why):
            Checkpoint(other)


def test_one_layer_at_a_time(base, tmp_path, monkeypatch):
    after, out = tmp_path / "tuned.safetensors", tmp_path / "out.safetensors"
    save_tensors({name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in weights().items()}, after)
    alive, most = weakref.WeakSet(), 0
    read = TensorFile.read

    def watched(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(TensorFile, "read", watched)
    assert run("extract", after, base.file.path, "--rank", "2", "--out", out) == 0
    assert 2 <= most <= 4  # a weight before and after, and its bias


# -- resize, convert


def test_several_files_into_a_folder(loras, base, tmp_path, capsys):
    out = tmp_path / "small"
    files = [path for path, _ in loras]
    assert run("resize", *files, "--rank", "1", "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["lora-1.safetensors", "lora-2.safetensors"]
    assert all(adapter.rank == 1 for adapter in read_lora(out / "lora-1.safetensors", base.table).adapters.values())
    kept = {path: path.read_bytes() for path in out.iterdir()}
    assert run("resize", *files, "--rank", "2", "--out", out) == 1
    assert "is there already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == kept
    assert run("resize", *files, "--rank", "2", "--out", out, "--overwrite") == 0
    assert run("resize", *files, "--rank", "2", "--out", tmp_path / "one.safetensors") == 1
    assert "is one file for 2" in capsys.readouterr().err


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "lycoris", "native"])
def test_convert(dialect, loras, base, tmp_path, capsys):
    (one, adapters), _ = loras
    out = tmp_path / "out.safetensors"
    command = ("convert", one, "--dialect", dialect, "--precision", "float16", "--base", base.file.path, "--out", out)
    assert run(*command) == 0
    assert load_tensors(out).metadata["loom.dialect"] == dialect
    assert "energy" not in capsys.readouterr().out and "energy" not in load_tensors(out).metadata["loom.tool"]
    for path, change in deltas(out, base).items():
        assert (change - adapters[path].delta()).norm() / change.norm() < 2e-3


def test_convert_to_plain_loras(base, tmp_path, capsys):
    adapters = adapters_for(base, "LoKr", factor=4, only=lambda path: "attn" in path)
    given, out = tmp_path / "lokr.safetensors", tmp_path / "out.safetensors"
    save_tensors(to_tensors(LoRAFile(adapters, names=base.table)), given)
    assert run("convert", given, "--plain", "--energy", "1", "--base", base.file.path, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["energy"] > 0.99999
    for path, change in deltas(out, base).items():
        torch.testing.assert_close(change, adapters[path].delta(), rtol=1e-3, atol=1e-5)
    for extra, why in (
        (("--dialect", "kohya"), "--dialect kohya needs --base"),
        (("--rank", "2"), "are for --plain"),
    ):
        assert run("convert", given, *extra, "--out", tmp_path / "x.safetensors") == 1
        assert why in capsys.readouterr().err


# -- writing


def test_a_configuration_is_not_overwritten_either(base, tmp_path, capsys):
    adapters = adapters_for(base, only=lambda path: path.startswith("diffusion_model.") and "attn" in path)
    given, out = tmp_path / "given.safetensors", tmp_path / "peft" / "adapter_model.safetensors"
    save_tensors(to_tensors(LoRAFile(adapters, names=base.table)), given)
    config = out.with_name("adapter_config.json")
    out.parent.mkdir()
    config.write_text("precious")
    command = ("convert", given, "--dialect", "peft", "--base", base.file.path, "--out", out)
    assert run(*command) == 1
    assert f"{config} is there already; give another --out, or --overwrite" in capsys.readouterr().err
    assert config.read_text() == "precious" and not out.exists()
    assert run(*command, "--overwrite") == 0 and json.loads(config.read_text())["peft_type"] == "LORA"
    assert run("convert", given, "--out", tmp_path / "adapter_model.safetensors") == 0  # has none


def test_an_interrupted_write_leaves_nothing(loras, tmp_path, monkeypatch, capsys):
    (one, _), (two, _) = loras
    out = tmp_path / "out" / "merged.safetensors"

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    for broken in ("replace", "fsync"):
        with monkeypatch.context() as faults:
            faults.setattr(safetensors_io.os, broken, full_disk)
            assert run("merge", one, two, "--out", out) == 1
        assert "No space left" in capsys.readouterr().err and not list(out.parent.iterdir())
    assert run("merge", one, two, "--out", out) == 0
    before = out.read_bytes()
    with monkeypatch.context() as faults:
        faults.setattr(safetensors_io.os, "replace", full_disk)
        assert run("merge", one, two, "--strengths", "1", "0.5", "--out", out, "--overwrite") == 1
    assert out.read_bytes() == before and [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_keyboard_stops_it(loras, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_loom.kernels.tools.command_line.merge", stop)
    assert run("merge", loras[0][0], "--out", tmp_path / "out.safetensors") == 130
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()


def test_what_was_finished_before_is_told(loras, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    resized, asked = command_line.resize, []

    def stop_at_the_second(*arguments, **options):
        asked.append(arguments)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return resized(*arguments, **options)

    monkeypatch.setattr(command_line, "resize", stop_at_the_second)
    assert run("resize", *(path for path, _ in loras), "--rank", "1", "--out", out) == 130
    assert capsys.readouterr().err == f"interrupted; finished by then: {out / 'lora-1.safetensors'}\n"
    assert [path.name for path in out.iterdir()] == ["lora-1.safetensors"]


# -- checkpoints


def test_encoders_of_sdxl_by_the_names_of_openclip(tmp_path):
    """Against the host's own way of reading: query, key and value are thirds, the projection is turned."""
    block = "conditioner.embedders.1.model.transformer.resblocks.3"
    fused, bias, projection = torch.randn(3 * TEXT, TEXT), torch.randn(3 * TEXT), torch.randn(TEXT, 5)
    tensors = weights(text=False) | {
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc2.weight": torch.randn(TEXT, 8),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(4),
        f"{block}.attn.in_proj_weight": fused,
        f"{block}.attn.in_proj_bias": bias,
        f"{block}.mlp.c_fc.weight": torch.randn(8, TEXT),
        "conditioner.embedders.1.model.text_projection": projection,
    }
    path = tmp_path / "xl.safetensors"
    save_tensors(tensors, path)
    found = Checkpoint(path)
    assert found.encoders == ("clip_l", "clip_g")
    layers = "clip_g.transformer.text_model.encoder.layers.3"
    for number, part in enumerate("qkv"):
        rows = slice(number * TEXT, (number + 1) * TEXT)
        assert torch.equal(found.weight(f"{layers}.self_attn.{part}_proj"), fused[rows])
        assert torch.equal(found.stored(f"{layers}.self_attn.{part}_proj.bias"), bias[rows])
        assert found.table.shapes[f"{layers}.self_attn.{part}_proj"] == (TEXT, TEXT)
    assert torch.equal(found.weight("clip_g.transformer.text_projection"), projection.T)
    assert torch.equal(found.weight(f"{layers}.mlp.fc1"), tensors[f"{block}.mlp.c_fc.weight"])
    query = found.table.find("lora_te2_text_model_encoder_layers_3_self_attn_q_proj")
    assert query is not None and query.path == f"{layers}.self_attn.q_proj"
    assert not any("position_ids" in key for key in found.keys)
    with pytest.raises(ValueError, match="is no weight of xl.safetensors; give the base"):
        found.weight("diffusion_model.nothing")


def test_a_file_is_read_tensor_by_tensor_and_never_held(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).half(), "c": torch.arange(6).view(2, 3)}
    save_tensors(tensors, path, {"key": "value"})
    file = TensorFile(path)
    assert file.metadata["key"] == "value" and file.shapes["c"] == (2, 3) and file.dtypes["b"] is torch.float16
    for name in ("c", "a", "b"):
        assert torch.equal(file.read(name), tensors[name])
    moved = path.rename(tmp_path / "b.safetensors")  # nothing holds it
    with pytest.raises(OSError):
        file.read("a")
    save_tensors({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="a.safetensors: was changed while it was read"):
        file.read("a")
    moved.unlink()


def test_what_is_empty_or_in_vain_is_told(loras, base, tmp_path, capsys):
    target = str(tmp_path / "made.safetensors")
    assert main(["merge", *(str(path) for path, _ in loras), "--strengths", "0", "0", "--out", target]) == 1
    assert "nothing is left that a LoRA could hold" in capsys.readouterr().err
    same = str(tmp_path / "base.safetensors")
    assert main(["extract", same, same, "--rank", "4", "--out", target]) == 1
    assert "the same in both models" in capsys.readouterr().err and not Path(target).exists()
    assert main(["merge", *(str(path) for path, _ in loras), "--density", "0.3", "--seed", "5", "--out", target]) == 0
    told = capsys.readouterr().out
    assert "density: no effect with concat" in told and "seed: no effect with concat" in told


def test_negative_strengths_with_more_behind_them(loras, base, tmp_path):
    target = tmp_path / "made.safetensors"
    given = [str(path) for path, _ in loras]
    assert main(["merge", *given, "--strengths", "-0.5:te=0", "-1", "--out", str(target)]) == 0
    assert json.loads(load_tensors(target).metadata["loom.tool"])["parents"][0]["strength"] == "-0.5:te=0"


@pytest.mark.parametrize("size", ["inf", "nan", "0", "-3"])
def test_sizes_that_mean_nothing(loras, tmp_path, size, capsys):
    path = str(loras[0][0])
    assert main(["resize", path, f"--megabytes={size}", "--out", str(tmp_path / "made.safetensors")]) == 1
    assert capsys.readouterr().err.startswith("error: megabytes is")


def test_a_size_counts_the_precision_of_the_file(base, tmp_path):
    half, _ = in_precision(LoRAFile(adapters_for(base, rank=8), names=base.table), torch.float16)
    path, sizes = write_lora(half, tmp_path / "half.safetensors"), []
    for precision in ("as given", "float16"):
        target = tmp_path / f"{precision}.safetensors"
        assert main(["resize", str(path), "--megabytes", "0.01", "--precision", precision, "--out", str(target)]) == 0
        sizes.append(sum(tensor.nbytes for tensor in load_tensors(target).values()))
    assert sizes[0] == sizes[1] > 2000


def test_parameters_at_the_top_are_extracted(tmp_path):
    plain = {name.removeprefix("model.diffusion_model."): t for name, t in weights(text=False).items()}
    plain = {name: tensor for name, tensor in plain.items() if not name.startswith("first_stage_model")}
    plain |= {"scale_shift_table": torch.randn(2, WIDE), "betas": torch.rand(1000)}
    moved = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in plain.items()}
    paths = [save_tensors(state, tmp_path / f"{name}.safetensors") for name, state in (("b", plain), ("t", moved))]
    target = tmp_path / "made.safetensors"
    assert main(["extract", str(paths[1]), str(paths[0]), "--rank", "4", "--out", str(target)]) == 0
    keys = list(load_tensors(target))
    assert any("scale_shift_table" in key for key in keys) and not any("betas" in key for key in keys)


def test_a_terminal_of_few_letters(odd_folder, loras, tmp_path):
    target = tmp_path / "猫.safetensors"
    shutil.copy(loras[0][0], target)
    done = subprocess.run(
        [sys.executable, str(odd_folder / "run.py"), "inspect", str(target)],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0 and b"\\u732b" in done.stdout, done.stderr
