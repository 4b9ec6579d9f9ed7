"""Files of every dialect and of the trainers themselves find their place on every model; of a wrong base it is told."""

import os

import folder_paths
import peft
import pytest
import torch
from lycoris.wrapper import LycorisNetwork

import tiny
from full_size import full_size
from lora_loom.host import lora_cache
from lora_loom.host.apply import apply_lora
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.safetensors_io import save_tensors
from lora_loom.kernels.unplaced import grouped, summary
from lora_loom.kernels.writing import DIALECTS, to_tensors, write_lora
from lycoris_presets import preset

OLD = 1_600_000_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty LoRA folder of the host."""
    known = dict(folder_paths.folder_names_and_paths) | {"loras": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    return tmp_path


def put(folder, name, tensors, metadata=None):
    save_tensors(tensors, folder / name, metadata)


FAMILIES = {
    "native": ("LoRA", "LoHa", "LoKr", "OFT", "IA3", "GLoRA", "full"),
    "kohya": ("LoRA", "LoHa", "LoKr", "OFT", "full"),
    "lycoris": ("LoRA", "LoHa", "LoKr", "OFT", "GLoRA"),
    "diffusers": ("LoRA", "DoRA"),
    "peft": ("LoRA", "DoRA", "LoHa", "LoKr"),
}
FUSED = {"sd3", "flux", "flux2", "chroma", "hunyuan_video", "lumina2"}  # query, key and value in one layer
NOT_IN_PARTS = {("lycoris", "OFT"), ("peft", "LoKr")}  # as diffusers names them
MODELS = ("sd15", "sdxl", "sd3", "flux", "qwen_image", "wan", "lumina2", "hunyuan_video")


def adapters_on(patcher, family, every=5):
    state, found = patcher.model.state_dict(), {}
    for number, target in enumerate(select_targets(patcher.model, "attention+MLP", False)[::every]):
        draws = torch.Generator().manual_seed(number)
        weight = state[f"{target.path}.weight"].float()
        options = Options(rank=2, alpha=1.0, block_size=4, dora="output" if family == "DoRA" else "")
        fresh = make_adapter("LoRA" if family == "DoRA" else family, target.shape, options, draws, weight)
        numbers = {key: t + 0.05 * torch.randn(t.shape, generator=draws) for key, t in fresh.tensors.items()}
        found[target.path] = fresh.with_tensors(numbers)
    return found


def applies_whole(patcher, clip, name):
    """Through the cache onto the model: (adapters) with nothing left over."""
    loaded = lora_cache.get(name)
    _, _, applied = apply_lora(patcher, clip, loaded)
    assert applied.unplaced == ()
    assert applied.model_weights + applied.clip_weights
    table = NameTable.of(patcher.model)
    file = loaded.file(table)
    assert not file.unplaced
    count = len(file.adapters)
    assert summary(name, file, "fuse") == f"{name}: {count} of {count} layers placed, engine fuse"
    return file.adapters


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_on_every_model(folder, name, dialect):
    patcher = tiny.tiny(name)
    names, state = NameTable.of(patcher.model), patcher.model.state_dict()
    for number, family in enumerate(FAMILIES[dialect]):
        adapters = adapters_on(patcher, family, every=5 + number)
        place = folder / f"{family}/adapter_model.safetensors"
        if name in FUSED and (dialect, family) in NOT_IN_PARTS:
            with pytest.raises(ValueError, match="cannot"):
                write_lora(LoRAFile(adapters, names=names), place, dialect)
            continue
        path = write_lora(LoRAFile(adapters, names=names), place, dialect)
        os.utime(path, (OLD, OLD))
        found = applies_whole(patcher, None, f"{family}/adapter_model.safetensors")
        assert found.keys() == adapters.keys()
        for layer in list(adapters)[:3]:
            weight = state[f"{layer}.weight"].float()
            change = adapters[layer].merged(weight) - weight
            assert (found[layer].merged(weight) - weight - change).norm() <= 1e-3 * change.norm(), (family, layer)


def attention_of(patcher):
    """Paths inside the network."""
    targets = select_targets(patcher.model, "attention", False)
    return [target.path.removeprefix("diffusion_model.") for target in targets]


def randomised(module, size=0.05):
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=draws))


def on_models(kinds, usual):
    """The usual kind on every model, the others on one that is fused and one that is not."""
    return [(name, kind) for kind in kinds for name in (MODELS if kind == usual else ("sd15", "flux"))]


PEFT = {
    "LoRA": lambda layers: peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers),
    "DoRA": lambda layers: peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=layers),
    "LoHa": lambda layers: peft.LoHaConfig(r=2, alpha=3, target_modules=layers),
    "LoKr": lambda layers: peft.LoKrConfig(r=2, alpha=3, target_modules=layers),
    "OFT": lambda layers: peft.OFTConfig(r=0, oft_block_size=4, target_modules=layers),
}


@pytest.mark.parametrize(("name", "kind"), on_models(PEFT, "LoRA"))
def test_files_of_peft_itself(folder, name, kind):
    patcher = tiny.tiny(name)
    layers = attention_of(patcher)
    wrapped = peft.get_peft_model(tiny.tiny(name).model.diffusion_model, PEFT[kind](layers))
    randomised(wrapped)
    wrapped.save_pretrained(folder / kind)
    os.utime(folder / kind / "adapter_model.safetensors", (OLD, OLD))
    found = applies_whole(patcher, None, f"{kind}/adapter_model.safetensors")
    assert found.keys() == {f"diffusion_model.{layer}" for layer in layers}
    before = patcher.model.state_dict()
    merged = wrapped.merge_and_unload().state_dict()
    for layer in layers[:4]:
        weight = before[f"diffusion_model.{layer}.weight"].float()
        change = merged[f"{layer}.weight"].float() - weight
        got = found[f"diffusion_model.{layer}"].merged(weight) - weight
        assert (got - change).norm() <= 1e-3 * change.norm(), layer


LYCORIS = ("lora", "loha", "lokr", "glora", "ia3", "diag-oft", "full")


@pytest.mark.parametrize(("name", "algorithm"), on_models(LYCORIS, "lora"))
def test_files_of_lycoris_itself(folder, name, algorithm):
    patcher = tiny.tiny(name)
    network = tiny.tiny(name).model.diffusion_model
    wanted = sorted(attention_of(patcher))[::3]
    with preset(enable_conv=False, target_module=[], target_name=wanted, lora_prefix="lora_unet"):
        made = LycorisNetwork(network, 1.0, 2, 0, 1.5, 1.5, network_module=algorithm, warn_on_unmatched=False)
    made.apply_to()
    randomised(made)
    state = {key: tensor.detach().clone() for key, tensor in made.state_dict().items()}
    put(folder, "cat.safetensors", state, metadata={"ss_network_module": "lycoris.kohya"})
    assert len(applies_whole(patcher, None, "cat.safetensors")) == len(made.loras) > 0


def test_text_encoders_and_embeddings(folder):
    patcher, clip = tiny.tiny("sdxl"), tiny.tiny_dual_clip()
    names = NameTable.of(clip.cond_stage_model)
    adapters = {}
    for number, path in enumerate(path for path in names.text.paths if path.endswith(("fc1", "q_proj"))):
        shape = names.shapes[path]
        fresh = make_adapter("LoRA", shape, Options(rank=2), torch.Generator().manual_seed(number))
        adapters[path] = fresh.with_tensors({key: torch.randn(t.shape) for key, t in fresh.tensors.items()})
    for dialect in ("native", "kohya", "diffusers"):
        tensors = dict(to_tensors(LoRAFile(adapters, names=names), dialect))
        tensors["bundle_emb.mycat.clip_l"] = torch.randn(2, 64)
        tensors["bundle_emb.mycat.clip_g"] = torch.randn(2, 64)
        put(folder, f"{dialect}.safetensors", tensors)
        _, _, applied = apply_lora(patcher, clip, lora_cache.get(f"{dialect}.safetensors"))
        assert applied.unplaced == () and applied.words == ("mycat",)
        assert applied.clip_weights == len(adapters)


@pytest.mark.parametrize(("made", "used"), [("sd15", "sdxl"), ("sdxl", "sd15"), ("flux", "sd15"), ("sd15", "flux")])
def test_a_wrong_base_is_told_with_both_names(folder, made, used):
    """On the full-size models, as files that people have."""
    called = {"sd15": "SD1.5", "sdxl": "SDXL", "flux": "Flux"}
    theirs, here = NameTable.of(full_size(made)), NameTable.of(full_size(used))
    tensors = {}
    for path in [path for path, shape in theirs.shapes.items() if len(shape) == 2][:200]:
        rows, columns = theirs.shapes[path]
        name = theirs.write(path)
        tensors |= {f"{name}.lora_down.weight": torch.zeros(1, columns), f"{name}.lora_up.weight": torch.zeros(rows, 1)}
    put(folder, "cat.safetensors", tensors)
    file = lora_cache.get("cat.safetensors").file(here)
    lines = grouped(file.unplaced, here, file.architecture, file.evidence)
    assert file.unplaced and lines
    told = [line for line in lines if "wrong base" in line or ", shape;" in line]
    assert len(told) == len(lines)
    for line in told:
        assert f"; made for {called[made]} (" in line and f", the model is {called[used]}; " in line
    assert summary("cat.safetensors", file, "fuse").endswith(f", the model is {called[used]}")
