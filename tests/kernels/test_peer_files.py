"""Files that LyCORIS, PEFT and diffusers wrote are read whole, and they read those we write, with the same ΔW."""

import json

import pytest
import torch
from torch import nn

import run_host
from lora_loom.kernels.names import NameTable, layer_shapes
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.safetensors_io import LoraModel, save_tensors
from lora_loom.kernels.writing import write_lora

run_host.prepare_imports()

import diffusers  # noqa: E402
import peft  # noqa: E402
from lycoris.wrapper import LycorisNetwork, create_lycoris_from_weights  # noqa: E402

from lycoris_presets import preset  # noqa: E402


class Tiny(nn.Module):
    """Layers of every kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def forward(self, x):
        x = self.point(self.conv(x))
        return self.inner(self.norm(x.flatten(2).transpose(1, 2)))


def tiny(seed=0):
    torch.manual_seed(seed)
    return Tiny().requires_grad_(False)


X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(3))


def randomise(parameters, size=0.3):
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=draws))


def shapes_of(module):
    return layer_shapes(module)


def merged(module, file):
    """The output of ``module`` with all adapters of ``file`` in its weights and biases."""
    assert file.adapters and not file.unplaced, file.unplaced
    changed = {}
    named = dict(module.named_parameters())
    for path, adapter in file.adapters.items():
        path = path.removeprefix("diffusion_model.")
        changed[path + ".weight"] = adapter.merged(named[path + ".weight"])
        if path + ".bias" in named:
            changed[path + ".bias"] = adapter.merged_bias(named[path + ".bias"])
    return changed


def ours(module, file, *inputs):
    return torch.func.functional_call(module, merged(module, file), inputs)


# ---------------------------------------------------------------- LyCORIS

LYCORIS = {
    "lora": {"algo": "lora"},
    "lora, rank-stabilised": {"algo": "lora", "rs_lora": True},
    "lora, tucker": {"algo": "lora", "use_tucker": True},
    "lora, dora": {"algo": "lora", "weight_decompose": True},
    "lora, dora on inputs": {"algo": "lora", "weight_decompose": True, "wd_on_out": False},
    "lora, scalar": {"algo": "lora", "use_scalar": True},
    "loha": {"algo": "loha"},
    "loha, tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2, "linear_dim": 1, "conv_dim": 1},
    "lokr, both": {"algo": "lokr", "factor": 4, "linear_dim": 1, "conv_dim": 1, "decompose_both": True},
    "lokr, tucker": {"algo": "lokr", "factor": 2, "linear_dim": 1, "conv_dim": 1, "use_tucker": True},
    "lokr, full": {"algo": "lokr", "factor": 2, "full_matrix": True},
    "lokr, full, rank-stabilised": {"algo": "lokr", "factor": 2, "full_matrix": True, "rs_lora": True},
    "glora": {"algo": "glora"},
    "glora, rank-stabilised": {"algo": "glora", "rs_lora": True},
    "ia3": {"algo": "ia3"},
    "ia3, on inputs": {"algo": "ia3", "train_on_input": True},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 4},
    "diag-oft, constrained": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 4, "constraint": 0.01, "rescaled": True},
    "boft": {"algo": "boft", "linear_dim": 4, "conv_dim": 4},
    "full": {"algo": "full"},
    "full, norms": {"algo": "lora", "train_norm": True},
}


def lycoris_network(module, algo, linear_dim=2, conv_dim=2, **options):
    with preset():
        network = LycorisNetwork(
            module, 1.0, linear_dim, conv_dim, 1.5, 1.5, network_module=algo, warn_on_unmatched=False, **options
        )
    network.apply_to()
    randomise(network.parameters(), 0.1)
    return network


@pytest.mark.parametrize("kind", LYCORIS)
def test_files_of_lycoris(kind, tmp_path):
    module, changed = tiny(), tiny()
    options = LYCORIS[kind]
    network = lycoris_network(changed, **options)
    wanted = changed(X)
    arguments = json.dumps({key: str(value) for key, value in options.items()})
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": arguments}
    state = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    file = read_lora(save_tensors(state, tmp_path / "x.safetensors", metadata), shapes_of(module))
    assert len(file.adapters) == (5 if "norms" in kind else 4)
    torch.testing.assert_close(ours(module, file, X), wanted, rtol=2e-4, atol=2e-4)
    assert bool(file.notes) == (kind in ("glora, rank-stabilised", "lokr, full, rank-stabilised")), file.notes


READ_BY_LYCORIS = [kind for kind in LYCORIS if kind.partition(",")[0] in ("lora", "loha", "full", "glora", "diag-oft")]
READ_BY_LYCORIS += ["lokr"]
READ_BY_LYCORIS = [kind for kind in READ_BY_LYCORIS if "on inputs" not in kind]  # LyCORIS cannot read those itself


@pytest.mark.parametrize("kind", READ_BY_LYCORIS)
def test_lycoris_reads_ours(kind, tmp_path):
    module, changed = tiny(), tiny()
    network = lycoris_network(changed, **LYCORIS[kind])
    state = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    metadata = {"ss_network_args": json.dumps({key: str(value) for key, value in LYCORIS[kind].items()})}
    path = write_lora(read_lora(LoraModel(state, metadata), shapes_of(module)), tmp_path / "x.safetensors", "lycoris")
    again = read_lora(path, shapes_of(module))
    wanted = ours(module, again, X)
    restored = tiny()
    network, _ = create_lycoris_from_weights(1.0, str(path), restored)
    network.apply_to()
    torch.testing.assert_close(restored(X), wanted, rtol=2e-4, atol=2e-4)


# ---------------------------------------------------------------- PEFT

ALL = ["conv", "point", "inner.0", "inner.1"]
LINEAR = ["inner.0", "inner.1"]
PEFT = {
    "lora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=ALL),
    "lora, rank-stabilised": peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=ALL),
    "lora, patterns": peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=ALL, rank_pattern={"inner.0": 4}, alpha_pattern={r".*\.1": 5, "conv": 1}
    ),
    "lora, bias": peft.LoraConfig(r=2, lora_alpha=3, target_modules=LINEAR, lora_bias=True),
    "dora": peft.LoraConfig(r=2, lora_alpha=3, target_modules=ALL, use_dora=True),
    "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=ALL),
    "loha, tucker": peft.LoHaConfig(r=2, alpha=3, target_modules=ALL, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=1, alpha=3, target_modules=LINEAR),
    "lokr, tucker": peft.LoKrConfig(r=1, alpha=3, target_modules=ALL, use_effective_conv2d=True),
    "lokr, full": peft.LoKrConfig(r=64, alpha=3, target_modules=LINEAR),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR),
    "oft, shared": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR, block_share=True),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=LINEAR),
    "vera": peft.VeraConfig(r=4, target_modules=LINEAR),
    "ia3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=["inner.1"]),
}


NOT_WRITTEN = ("vera",)  # its matrices are shared by all layers


def adapted(config, name="default"):
    """(the changed module, its PEFT model)"""
    changed = tiny()
    model = peft.get_peft_model(changed, config, adapter_name=name)
    randomise([p for key, p in model.named_parameters() if p.requires_grad and "magnitude" not in key], 0.1)
    return changed, model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PEFT)
def test_files_of_peft(kind, tmp_path):
    """What save_pretrained leaves in a folder, and a state dict with the adapter's name still in its keys."""
    changed, model = adapted(PEFT[kind], "my-style")
    wanted = model.eval()(X).detach()
    model.save_pretrained(tmp_path)
    shapes = shapes_of(tiny())
    file = read_lora(tmp_path / "my-style" / "adapter_model.safetensors", shapes)
    torch.testing.assert_close(ours(tiny(), file, X), wanted, rtol=2e-4, atol=2e-4)
    raw = {key: tensor for key, tensor in model.state_dict().items() if "my-style" in key}
    config = {"adapter_config": json.dumps(json.loads((tmp_path / "my-style" / "adapter_config.json").read_text()))}
    torch.testing.assert_close(ours(tiny(), read_lora(LoraModel(raw, config), shapes), X), wanted, rtol=2e-4, atol=2e-4)
    assert changed is not model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in PEFT if kind not in NOT_WRITTEN])
def test_peft_reads_ours(kind, tmp_path):
    _, model = adapted(PEFT[kind])
    wanted = model.eval()(X).detach()
    model.save_pretrained(tmp_path / "theirs")
    file = read_lora(tmp_path / "theirs" / "adapter_model.safetensors", shapes_of(tiny()))
    (tmp_path / "ours").mkdir()
    write_lora(file, tmp_path / "ours" / "adapter_model.safetensors", "peft")
    restored = peft.PeftModel.from_pretrained(tiny(), tmp_path / "ours")
    torch.testing.assert_close(restored.eval()(X), wanted, rtol=2e-4, atol=2e-4)


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.point, self.conv = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 3)

    def forward(self, x):
        return self.point(x)


@pytest.mark.filterwarnings("ignore")
def test_pefts_rotations_of_convolutions(tmp_path):
    """1×1 ones turn as linear layers do; of others PEFT turns overlapping patches, which no weight does."""
    torch.manual_seed(0)
    module = Points().requires_grad_(False)
    shapes, state = shapes_of(module), {key: value.clone() for key, value in module.state_dict().items()}
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=["point", "conv"])
    model = peft.get_peft_model(module, config).eval()
    randomise([p for name, p in model.named_parameters() if "oft_R" in name])
    wanted = model(X)
    model.save_pretrained(tmp_path)
    file = read_lora(tmp_path / "adapter_model.safetensors", shapes)
    assert {item.key for item in file.unplaced} == {"base_model.model.conv.oft_R.weight"}
    assert "overlapping patches" in file.unplaced[0].detail
    plain = Points().requires_grad_(False)
    plain.load_state_dict(state)
    changed = {"point.weight": file.adapters["point"].merged(plain.point.weight)}
    torch.testing.assert_close(torch.func.functional_call(plain, changed, (X,)), wanted, rtol=2e-4, atol=2e-4)
    ours = LoRAFile(file.adapters, names=NameTable(shapes))
    path = write_lora(ours, tmp_path / "ours" / "adapter_model.safetensors", "peft")
    theirs = peft.PeftModel.from_pretrained(plain, path.parent).eval()
    torch.testing.assert_close(theirs(X), wanted, rtol=2e-4, atol=2e-4)
    again = read_lora(path, shapes)
    torch.testing.assert_close(again.adapters["point"].tensors, file.adapters["point"].tensors)
    rotations = read_lora({"conv.oft_R.weight": torch.randn(18, 6)}, shapes)
    with pytest.raises(ValueError, match="conv: PEFT's OFT turns overlapping patches"):
        write_lora(LoRAFile(rotations.adapters, names=NameTable(shapes)), tmp_path / "conv.safetensors", "peft")


# ---------------------------------------------------------------- diffusers


def diffusers_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).requires_grad_(False)


def diffusers_flux():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=6,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=False,
    ).requires_grad_(False)


MODELS = {
    "unet": (diffusers_unet, ["to_k", "to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj"]),
    "transformer": (diffusers_flux, ["to_k", "to_q", "to_v", "to_out.0", "proj_out", "norm1.linear", "add_q_proj"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("component", MODELS)
def test_files_of_diffusers(component, dora, tmp_path):
    """What save_lora_weights of a pipeline makes, with and without its metadata, read for the model's own layers."""
    make, targets = MODELS[component]
    model = make()
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, use_dora=dora))
    randomise([p for name, p in model.named_parameters() if p.requires_grad and "magnitude" not in name], 0.1)
    layers = peft.get_peft_model_state_dict(model)
    pipeline = diffusers.StableDiffusionPipeline if component == "unet" else diffusers.FluxPipeline
    pipeline.save_lora_weights(tmp_path, **{f"{component}_lora_layers": layers}, safe_serialization=True)
    file = read_lora(tmp_path / "pytorch_lora_weights.safetensors", shapes_of(make()))
    assert not file.unplaced and len(file.adapters) == len({key.rpartition(".lora_")[0] for key in layers})
    model.save_lora_adapter(tmp_path / "alone", adapter_name="default")
    alone = read_lora(next((tmp_path / "alone").glob("*.safetensors")), shapes_of(make()))
    assert not alone.unplaced and alone.adapters.keys() == file.adapters.keys()
    weights = dict(model.named_modules())
    for path, adapter in file.adapters.items():
        layer = weights[path]
        layer.merge()
        base = make().get_submodule(path).weight
        torch.testing.assert_close(adapter.merged(base), layer.base_layer.weight, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(alone.adapters[path].merged(base), layer.base_layer.weight, rtol=2e-4, atol=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("alpha", [2, 5])
def test_diffusers_reads_ours(alpha, tmp_path):
    """Layers of different ranks and an alpha, read through load_lora_adapter."""
    model = diffusers_unet()
    targets = ["attn1.to_q", "attn2.to_k", "conv1"]
    config = peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, rank_pattern={"conv1": 3})
    model.add_adapter(config)
    randomise([p for p in model.parameters() if p.requires_grad], 0.1)
    model.save_lora_adapter(tmp_path, adapter_name="default")
    shapes = shapes_of(diffusers_unet())
    file = read_lora(next(tmp_path.glob("*.safetensors")), shapes)
    plain = LoRAFile(file.adapters, names=NameTable(shapes))
    path = write_lora(plain, tmp_path / "ours.safetensors", "diffusers")
    restored = diffusers_unet()
    restored.load_lora_adapter(path.parent, weight_name=path.name, prefix=None)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 12))
    wanted = model(*inputs).sample
    assert not torch.allclose(diffusers_unet()(*inputs).sample, wanted, atol=1e-2)
    torch.testing.assert_close(restored(*inputs).sample, wanted, rtol=2e-4, atol=2e-4)
