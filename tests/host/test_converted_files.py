"""Converted files: every family as plain LoRA, in every dialect, does in the host and in the peers' own loaders what it
did before, but for the error that is stated."""

import json

import comfy.lora
import comfy.utils
import peft
import pytest
import torch
from lycoris.wrapper import create_lycoris_from_weights

import tiny
from applying import lora_on, norms, random_adapter
from lora_loom.kernels.full import Full
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.names import NameTable, layer_shapes
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.safetensors_io import load_tensors, save_tensors
from lora_loom.kernels.tools.convert import PRECISIONS, in_precision, plain
from lora_loom.kernels.writing import to_tensors, write_lora
from test_peer_files import LYCORIS, PEFT, X, adapted, diffusers_unet, lycoris_network, ours, shapes_of
from test_peer_files import tiny as tiny_module
from test_written_files import patched_by_the_host

FAMILIES = {
    "LoHa": ("LoHa", {}),
    "LoHa, cores": ("LoHa", {"tucker": True}),
    "LoKr": ("LoKr", {"rank": 1}),
    "LoKr, full": ("LoKr", {"full_rank": True}),
    "LoCon, cores": ("LoRA", {"tucker": True}),
    "DoRA": ("LoRA", {"dora": "output"}),
    "DoRA of LoHa, inputs": ("LoHa", {"dora": "input"}),
    "OFT": ("OFT", {"rescale": True}),
    "BOFT": ("BOFT", {"block_size": 16}),
    "OFTv2": ("OFTv2", {}),
    "(IA)³": ("IA3", {}),
    "GLoRA": ("GLoRA", {}),
    "full": ("full", {}),
    "full, biases": ("full", {"bias": True}),
}
DIALECTS = {"sd15": ("native", "kohya"), "flux": ("native", "kohya", "diffusers")}
ALL = Cut(energy=1.0)


def file_on(name, family, options):
    """(the model, a file of the family on some of its layers, their weights by path)."""
    patcher = tiny.tiny(name)
    adapters, _ = lora_on(patcher, family, options, every=9)
    state = {key: value.float().clone() for key, value in patcher.model.state_dict().items()}
    file = LoRAFile(adapters, names=NameTable(layer_shapes(patcher.model)))
    return patcher, file, lambda path: state[f"{path}.weight"]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", DIALECTS)
def test_every_family_in_the_hosts_own_loader(name, kind, tmp_path, caplog):
    """From our file of the family to a plain one in each dialect: no key is left over, the error is the stated one."""
    patcher, file, weights = file_on(name, *FAMILIES[kind])
    read = read_lora(save_tensors(to_tensors(file), tmp_path / "source.safetensors"), file.names)
    assert not read.unplaced and read.adapters.keys() == file.adapters.keys()
    state = patcher.model.state_dict()
    for cut in (ALL, None, Cut(rank=2)):
        outcome = plain(read, cut, weights)
        assert {row.path for row in outcome.layers} == file.adapters.keys()
        for dialect in DIALECTS[name][: 2 if "biases" in kind else 3]:  # the host does not read biases of PEFT's files
            path = write_lora(outcome.file, tmp_path / f"{dialect}.safetensors", dialect)
            patched = patched_by_the_host(patcher, load_tensors(path), caplog)
            for row in outcome.layers:
                weight, adapter = weights(row.path), file.adapters[row.path]
                wanted = adapter.merged(weight) - weight
                error = (patched.pop(row.path) - weight - wanted).norm().item()
                assert error == pytest.approx(row.error, rel=1e-2, abs=2e-4 * row.norm), (row.path, dialect)
                assert row.norm == pytest.approx(wanted.norm().item(), rel=1e-3)
                if f"{row.path}.bias" in patched:
                    bias = adapter.merged_bias(state[f"{row.path}.bias"].float())
                    torch.testing.assert_close(patched.pop(f"{row.path}.bias"), bias)
            assert not patched, "more was changed than the file has"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "DoRA", "full"])
def test_every_precision_in_the_hosts_own_loader(kind, precision, tmp_path, caplog):
    """Plain files whose factors float16 cannot hold as they are; eight bits the host reads like any other."""
    patcher, file, weights = file_on("sd15", *FAMILIES[kind])
    made = plain(file, ALL, weights).file
    for adapter in made.adapters.values():
        adapter.tensors.update({key: t * (1e-7 if "up" in key else 1e7) for key, t in adapter.tensors.items()})
    half, notes = in_precision(made, PRECISIONS[precision])
    path = write_lora(half, tmp_path / "x.safetensors")
    assert {str(t.dtype).removeprefix("torch.") for t in load_tensors(path).values() if t.numel() > 1} == {precision}
    patched = patched_by_the_host(patcher, comfy.utils.load_torch_file(str(path), safe_load=True), caplog)
    for layer, adapter in file.adapters.items():
        weight = weights(layer)
        wanted = adapter.merged(weight) - weight
        error = (patched[layer] - weight - wanted).norm() / wanted.norm()
        assert error < 2e-4 + torch.finfo(PRECISIONS[precision]).eps, layer
    assert any("balanced" in note for note in notes) == (precision in ("float16", "float8_e4m3fn"))


def test_norms_and_biases_stay_what_the_host_reads(tmp_path, caplog):
    patcher = tiny.tiny("sd15")
    model = norms(patcher, 1) | {key: t for key, t in lora_on(patcher, "LoHa", every=40)[1].items()}
    file = read_lora(model, NameTable(layer_shapes(patcher.model)))
    outcome = plain(file)
    path = write_lora(outcome.file, tmp_path / "x.safetensors", "kohya")
    patched = patched_by_the_host(patcher, load_tensors(path), caplog)
    state, moved = patcher.model.state_dict(), 0
    for layer, adapter in file.adapters.items():
        weight = state[f"{layer}.weight"].float()
        torch.testing.assert_close(patched[layer], adapter.merged(weight), rtol=1e-4, atol=1e-5)
        moved += isinstance(adapter, Full)
    assert moved > 20 and patched.keys() == file.adapters.keys()


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "DoRA of LoHa, inputs"])
def test_text_encoders(kind, tmp_path):
    clip = tiny.tiny_clip()
    shapes, state = layer_shapes(clip.cond_stage_model), clip.cond_stage_model.state_dict()
    table, (family, options) = NameTable(shapes), FAMILIES[kind]
    paths = [path for path in table.text.paths if len(shapes[path]) == 2 and ".encoder." in path]
    weights = {path: state[f"{path}.weight"].float() for path in paths}
    adapters = {path: random_adapter(family, shapes[path], options, weights[path], n) for n, path in enumerate(paths)}
    made = plain(LoRAFile(adapters, names=table), ALL, weights.__getitem__).file
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    for dialect in ("native", "kohya", "diffusers"):
        patches = comfy.lora.load_lora(
            dict(load_tensors(write_lora(made, tmp_path / "te.safetensors", dialect))), names
        )
        assert {key.removesuffix(".weight") for key in patches} == set(paths)
        for path, weight in weights.items():
            patch = [(1.0, patches[f"{path}.weight"], 1.0, None, None)]
            got = comfy.lora.calculate_weight(patch, weight.clone(), path)
            torch.testing.assert_close(got, adapters[path].merged(weight), rtol=2e-4, atol=2e-5)


# -- the peers' own loaders


def plain_of(path):
    """(the plain file, whether biases are scaled as no file can hold it) of a peer's file."""
    module = tiny_module()
    weights = {name.removesuffix(".weight"): weight for name, weight in module.named_parameters()}
    file = read_lora(path, shapes_of(module))
    outcome = plain(file, ALL, weights.__getitem__)
    assert not file.unplaced and all(row.error <= 1e-5 * row.norm for row in outcome.layers)
    told = any("scales the biases" in note for note in outcome.notes)
    if not told:
        torch.testing.assert_close(ours(module, outcome.file, X), ours(module, file, X), rtol=2e-4, atol=2e-4)
    return outcome.file


def by_lycoris(file, folder):
    """What LyCORIS makes of our file."""
    path = write_lora(file, folder / "ours.safetensors", "lycoris")
    module = tiny_module()
    network, _ = create_lycoris_from_weights(1.0, str(path), module)
    network.apply_to()
    return module(X)


def by_peft(file, folder):
    write_lora(file, folder / "ours" / "adapter_model.safetensors", "peft")
    return peft.PeftModel.from_pretrained(tiny_module(), folder / "ours").eval()(X)


# LyCORIS' own reader leaves out biases beside factors, PEFT has no norms
OF_LYCORIS = [kind for kind in LYCORIS if kind not in ("full", "full, norms")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OF_LYCORIS)
def test_files_of_lycoris_as_plain_ones(kind, tmp_path):
    """LyCORIS and PEFT both read them, with the effect that LyCORIS' own network has."""
    changed = tiny_module()
    network = lycoris_network(changed, **LYCORIS[kind])
    arguments = json.dumps({key: str(value) for key, value in LYCORIS[kind].items()})
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": arguments}
    state = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    file = plain_of(save_tensors(state, tmp_path / "theirs.safetensors", metadata))
    wanted = changed(X)
    torch.testing.assert_close(by_lycoris(file, tmp_path), wanted, rtol=3e-4, atol=3e-4)
    torch.testing.assert_close(by_peft(file, tmp_path), wanted, rtol=3e-4, atol=3e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in PEFT if kind != "lora, bias"])
def test_files_of_peft_as_plain_ones(kind, tmp_path):
    _, model = adapted(PEFT[kind])
    wanted = model.eval()(X).detach()
    model.save_pretrained(tmp_path / "theirs")
    file = plain_of(tmp_path / "theirs" / "adapter_model.safetensors")
    if kind == "ia3":  # scaled biases are the one thing that no plain file holds; it is said
        wanted = ours(tiny_module(), file, X)
    torch.testing.assert_close(by_lycoris(file, tmp_path), wanted, rtol=3e-4, atol=3e-4)
    torch.testing.assert_close(by_peft(file, tmp_path), wanted, rtol=3e-4, atol=3e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if "biases" not in kind])
def test_plain_files_in_diffusers(kind, tmp_path):
    """A UNet of diffusers loads them by its own loader, with the effect of the family."""
    family, options = FAMILIES[kind]
    model = diffusers_unet()
    targets = ("attn1.to_q", "attn2.to_k", "conv1", "ff.net.0.proj")
    weights = {
        name.removesuffix(".weight"): weight
        for name, weight in model.named_parameters()
        if name.removesuffix(".weight").endswith(targets)
    }
    made = {
        path: random_adapter(family, weight.shape, options, weight, n, 0.05)
        for n, (path, weight) in enumerate(weights.items())
    }
    file = plain(LoRAFile(made, names=NameTable(shapes_of(model))), ALL, weights.__getitem__).file
    path = write_lora(file, tmp_path / "ours.safetensors", "diffusers")
    restored = diffusers_unet()
    restored.load_lora_adapter(path.parent, weight_name=path.name, prefix=None)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12))
    moved = {f"{path}.weight": adapter.merged(weights[path]) for path, adapter in made.items()}
    wanted = torch.func.functional_call(diffusers_unet(), moved, inputs).sample
    assert not torch.allclose(diffusers_unet()(*inputs).sample, wanted, atol=1e-2)
    torch.testing.assert_close(restored(*inputs).sample, wanted, rtol=5e-4, atol=5e-4)
