"""Pictures with a block of a LoRA left out, or alone, are those that the loader gives with such blocks, at one load."""

import gc
import math
import re
from collections import Counter

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import folder_paths
import numpy as np
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL

import graph
import nodes
import tiny
from applying import lora_on, relative
from graph import Graph, GraphError, node
from lora_loom.host import analyser, branching, lora_cache
from lora_loom.host.analyser import BY_DIFFERENCE, GROUP, MODES, ONLY, WITHOUT, Options, analyse
from lora_loom.host.apply import BRANCH, Strengths, apply_lora
from lora_loom.host.branching import stack_on
from lora_loom.kernels.block_names import resolve
from lora_loom.kernels.blocks import BlockIndex, block_map
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile
from lora_loom.kernels.safetensors_io import save_tensors
from lora_loom.kernels.strengths.schedule import fixed
from lora_loom.kernels.writing import to_tensors
from lora_loom.nodes.analysing import LoomBlockAnalyser

FAMILIES = ("sd15", "flux")
SHORT = dict(steps=2, cfg=2.0, seed=7)


@pytest.fixture(scope="module")
def vaes():
    """Of the host's usual kind, without its three halvings: a pixel for each number of a latent."""
    found = {}
    with torch.inference_mode():
        for name in FAMILIES:
            channels = tiny.SPECS[name].latent[0]
            config = {"ddconfig": {**tiny.VAE_CONFIG, "z_channels": channels, "ch_mult": [1]}, "embed_dim": channels}
            weights = tiny.fill(AutoencoderKL(**config)).state_dict()
            weights = {key: tensor.clone() for key, tensor in weights.items()}
            found[name] = comfy.sd.VAE(sd=weights, config={"params": config})
    return found


def texts(name):
    return tiny.conditioning(name, seed=1), tiny.conditioning(name, seed=2)


def written(model, adapters):
    """As a file has them."""
    return to_tensors(LoRAFile(adapters, names=NameTable.of(model.model)))


def picture(model, name, vae, steps=2, cfg=2.0, seed=7, sampler="euler", scheduler="normal", denoise=1.0, start=None):
    """What the host's KSampler and VAE give."""
    with torch.inference_mode():
        positive, negative = texts(name)
        latent = {"samples": tiny.latent(name) if start is None else start}
        (sampled,) = nodes.common_ksampler(
            model, seed, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise
        )
        return vae.decode(sampled["samples"])[0].float().clamp(0, 1)


def analysed(model, name, vae, tensors, latent=None, **options):
    with torch.inference_mode():
        latent = {"samples": tiny.latent(name)} if latent is None else latent
        options = Options(**{**SHORT, **options})
        return analyse(model, *texts(name), latent, vae, lora_cache.of(dict(tensors), "cat"), options)


def rows(table):
    """label → (to the whole, to none, change of weights)."""
    found = re.findall(r"^(\S.*?)  +\d* +(\d\.\d{5})  +(\d\.\d{5})(?:  +(\S+) %)?$", table, re.MULTILINE)
    return {label: (float(a), float(b), share) for label, a, b, share in found}


def labels(found):
    return [label.removeprefix("without ").removeprefix("only ") for label in list(rows(found.table))[2:]]


# ---------------------------------------------------------------- the same as by the loader


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_pictures_are_those_of_the_loader_with_such_blocks(name, mode, vaes):
    model, vae = tiny.tiny(name), vaes[name]
    _, tensors = lora_on(model, every=4)
    found = analysed(model, name, vae, tensors, mode=mode, strength=0.8)
    base, whole, *others = found.pictures
    assert torch.equal(base, picture(model, name, vae))
    strong = Strengths.of(0.8)
    assert torch.equal(whole, picture(apply_lora(model, None, tensors, strong, BRANCH)[0], name, vae))
    by_host = comfy.sd.load_lora_for_models(model, None, dict(tensors), 0.8, 0.0)[0]
    assert (whole - picture(by_host, name, vae)).abs().max() < 1e-4 < (whole - base).abs().max()
    assert len(others) == len(labels(found)) > 2
    for block, got in zip(labels(found), others, strict=True):
        text = f"{block}=0" if mode == WITHOUT else f"all=0, {block}=1"
        loaded, *_ = apply_lora(model, None, tensors, Strengths(fixed(0.8), blocks=text), BRANCH)
        assert relative(got, picture(loaded, name, vae)) < 1e-6


def test_the_numbers(vaes):
    model = tiny.tiny("sd15")
    _, tensors = lora_on(model, every=6)
    found = analysed(model, "sd15", vaes["sd15"], tensors)
    base, whole, *others = (p.double().numpy() for p in found.pictures)
    told = rows(found.table)
    assert told["without the LoRA"][:2] == pytest.approx([np.abs(base - whole).mean(), 0], abs=1e-5)
    assert told["the whole LoRA"][:2] == pytest.approx([0, np.abs(base - whole).mean()], abs=1e-5)
    for label, got in zip(list(told)[2:], others, strict=True):
        wanted = [np.abs(got - whole).mean(), np.abs(got - base).mean()]
        assert told[label][:2] == pytest.approx(wanted, abs=1e-5) and wanted[0] > 0


def test_change_of_weights(vaes):
    model = tiny.tiny("sd15")
    adapters, tensors = lora_on(model, every=3)
    state, index = model.model.state_dict(), BlockIndex(block_map(model.model))
    found = rows(analysed(model, "sd15", vaes["sd15"], tensors, strength=-2.0, granularity=GROUP).table)
    members = {}
    for path, adapter in adapters.items():
        block, weight = index.of(path), state[f"{path}.weight"].double()
        squares = members.setdefault(block.group if block else "base", [0.0, 0.0])
        squares[0] += 4 * (adapter.merged(weight) - weight).square().sum().item()
        squares[1] += weight.square().sum().item()
    assert len(found) == 2 + len(members)
    for label, (_, _, share) in list(found.items())[2:]:
        group = label.removeprefix("without ").partition(" ")[0]
        change, weight = members[next(known for known in members if known.startswith(group))]
        assert float(share) / 100 == pytest.approx(math.sqrt(change / weight), rel=0.06)


def test_samplers_seeds_and_latents(vaes):
    model, vae = tiny.tiny("sd15"), vaes["sd15"]
    _, tensors = lora_on(model, every=20)
    start = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    whole = apply_lora(model, None, tensors, Strengths.of(1.0), BRANCH)[0]
    for how in (
        dict(sampler="dpmpp_2m_sde", scheduler="karras", steps=3),
        dict(sampler="euler_ancestral", scheduler="normal", seed=2**63),
        dict(denoise=0.5, start=start, steps=4),
    ):
        latent = {"samples": how["start"]} if "start" in how else None
        options = {name.replace("sampler", "sampler_name"): how[name] for name in how if name != "start"}
        found = analysed(model, "sd15", vae, tensors, latent, blocks="base", **options)
        first = how | {"start": start[:1]} if latent else how
        assert torch.equal(found.pictures[0], picture(model, "sd15", vae, **first))
        assert torch.equal(found.pictures[1], picture(whole, "sd15", vae, **first))
        assert ("latent_image: the first of 3 is used" in found.table) == bool(latent)


def test_on_top_of_other_loras(vaes):
    """Those that the MODEL has already, fused and branched, stay in every picture."""
    model, vae = tiny.tiny("sd15"), vaes["sd15"]
    for seed, engine in ((5, "fuse"), (6, "branch")):
        model = apply_lora(model, None, lora_on(model, seed=seed, every=9)[1], engine=engine)[0]
    _, tensors = lora_on(model, seed=1, every=7)
    before = stack_on(model)
    found = analysed(model, "sd15", vae, tensors, blocks="in, mid", granularity=GROUP)
    assert relative(found.pictures[0], picture(model, "sd15", vae)) < 1e-6 and stack_on(model) is before
    for group, got in zip(labels(found), found.pictures[2:], strict=True):
        text = f"{group.split()[0].replace('input', 'input_blocks') if group == 'input' else group.split()[0]}=0"
        loaded, *_ = apply_lora(model, None, tensors, Strengths(blocks=text), BRANCH)
        assert relative(got, picture(loaded, "sd15", vae)) < 1e-6


# ---------------------------------------------------------------- which block matters


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_the_block_that_matters_is_shown(name, mode, vaes):
    model = tiny.tiny(name)
    adapters, _ = lora_on(model, every=2)
    places = {path: block.id for path in adapters if (block := BlockIndex(block_map(model.model)).of(path))}
    matters = sorted(set(places.values()))[len(set(places.values())) // 2]
    uneven = {
        path: adapter.with_tensors(
            {part: tensor * (1 if places.get(path) == matters else 1e-3) for part, tensor in adapter.tensors.items()}
        )
        for path, adapter in adapters.items()
    }
    found = analysed(model, name, vaes[name], written(model, uneven), mode=mode, order=BY_DIFFERENCE)
    told = {label: row[0 if mode == WITHOUT else 1] for label, row in list(rows(found.table).items())[2:]}
    first, *rest = told.items()
    assert resolve(labels(found)[0], block_map(model.model)) == {matters}
    assert first[1] > 0.9 * rows(found.table)["the whole LoRA"][1] > 50 * max(number for _, number in rest)
    shares = [float(row[2]) for row in list(rows(found.table).values())[2:]]
    assert shares[0] > 1000 * max(shares[1:])


def test_the_greatest_difference_first(vaes):
    model = tiny.tiny("flux", depth=3)
    _, tensors = lora_on(model, every=2)
    for mode, column in ((WITHOUT, 0), (ONLY, 1)):
        plain = analysed(model, "flux", vaes["flux"], tensors, mode=mode)
        ranked = analysed(model, "flux", vaes["flux"], tensors, mode=mode, order=BY_DIFFERENCE)
        assert rows(plain.table) == rows(ranked.table) and labels(plain) != labels(ranked)
        numbers = [row[column] for row in list(rows(ranked.table).values())[2:]]
        assert numbers == sorted(numbers, reverse=True)
        for found in (plain, ranked):  # pictures are in the order of the table
            for row, got in zip(rows(found.table).values(), found.pictures, strict=True):
                assert (got - found.pictures[1]).abs().mean().item() == pytest.approx(row[0], abs=1e-5)


# ---------------------------------------------------------------- the cost


@pytest.mark.parametrize("kept", [torch.float32, torch.float8_e4m3fn])
def test_one_load_and_no_patches_however_many_pictures(kept, vaes, monkeypatch):
    counted, model = Counter(), None

    def watch(owner, name):
        real = getattr(owner, name)

        def counting(*args, **kwargs):
            if not isinstance(args[0], comfy.model_patcher.ModelPatcher) or args[0].model is model.model:
                counted[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for name in ("patch_weight_to_device", "load"):
        watch(comfy.model_patcher.ModelPatcher, name)
    watch(analyser, "apply_lora")
    watch(branching._Layer, "__init__")
    watch(branching.LayerBranch, "prepare")
    watch(lora_cache, "read_lora")
    costs = []
    for blocks in ("in", "in, out"):
        model = tiny.tiny("sd15", dtype=kept, compute_dtype=torch.float32)
        _, tensors = lora_on(model, every=3)
        bits = {key: tensor.clone() for key, tensor in model.model.state_dict().items()}
        counted.clear()
        found = analysed(model, "sd15", vaes["sd15"], tensors, blocks=blocks)
        assert not model.backup and counted["prepare"] > 0
        assert all(same_bits(bits[key], tensor) for key, tensor in model.model.state_dict().items())
        del counted["prepare"]  # layers look whether they are prepared at every call
        costs.append((len(found.pictures), counted.copy()))
    (few, first), (many, second) = costs
    assert many > few + 2 and first == second
    assert first["apply_lora"] == first["load"] == first["read_lora"] == 1 and first["__init__"] > 20


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def test_a_picture_costs_its_steps(vaes):
    model, calls = tiny.tiny("sd15"), []
    _, tensors = lora_on(model, every=9)
    net = model.model.diffusion_model
    net.register_forward_hook(lambda *_: calls.append(1))
    found = analysed(model, "sd15", vaes["sd15"], tensors, steps=3, cfg=1.0)
    assert len(calls) == 3 * len(found.pictures)
    assert f"{len(found.pictures)} pictures of 3 steps each, {len(calls)} steps in all" in found.table


def test_too_many_pictures_are_refused_before_the_first(vaes, monkeypatch):
    model = tiny.tiny("sd15")
    _, tensors = lora_on(model, every=2)
    monkeypatch.setattr(analyser.comfy.sample, "sample", lambda *a, **k: pytest.fail("it has begun"))
    with pytest.raises(ValueError, match=r"max_pictures is 5, but \d+ parts make \d+ pictures of 2 steps each; raise"):
        analysed(model, "sd15", vaes["sd15"], tensors, max_pictures=5)


def test_cancelled_within_a_picture_and_between(vaes, monkeypatch):
    model = tiny.tiny("sd15")
    _, tensors = lora_on(model, every=10)
    interrupted = comfy.model_management.InterruptProcessingException
    for after in (1, 3, 4, 5):
        seen = []

        def advance(self, value, *args, seen=seen, after=after, **kwargs):
            seen.append(value)
            if len(seen) == after:
                comfy.model_management.interrupt_current_processing()

        monkeypatch.setattr(analyser.Progress, "tell", lambda *a, **k: None)
        monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", advance)
        with pytest.raises(interrupted):
            analysed(model, "sd15", vaes["sd15"], tensors, steps=3)
        assert len(seen) == after
        assert torch.equal(picture(model, "sd15", vaes["sd15"]), picture(tiny.tiny("sd15"), "sd15", vaes["sd15"]))


def test_the_bar_goes_to_its_end(vaes, monkeypatch):
    seen, told = [], []
    monkeypatch.setattr(analyser.Progress, "tell", lambda self, text, now=False: told.append(text))
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda bar, n, **k: seen.append((n, bar.total)))
    model = tiny.tiny("sd15")
    _, tensors = lora_on(model, every=10)
    found = analysed(model, "sd15", vaes["sd15"], tensors, sampler_name="dpmpp_sde", steps=3, blocks="mid, base")
    assert len(found.pictures) == 4
    numbers = [number for number, total in seen]
    assert numbers == sorted(numbers) and numbers[-1] == 12 == seen[0][1] and set(numbers) == set(range(1, 13))
    assert told[0] == "4 pictures of 3 steps each, 12 steps in all" and told[-1].startswith("4 of 4: ")


# ---------------------------------------------------------------- choosing blocks, and what cannot be


def test_blocks_and_notes(vaes):
    model = tiny.tiny("sd15")
    adapters, _ = lora_on(model)
    inside = [path for path in adapters if "input_blocks.1." in path or "output_blocks.1." in path]
    tensors = written(model, {path: adapters[path] for path in inside})
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 64),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(128, 1),
            "lora_unet_nowhere.lora_down.weight": torch.ones(1, 4),
            "lora_unet_nowhere.lora_up.weight": torch.ones(4, 1)}  # fmt: skip
    found = analysed(model, "sd15", vaes["sd15"], {**tensors, **text}, blocks="IN00-01")
    assert labels(found) == ["input.1"]
    assert "not shown, since the LoRA does not change them: input_blocks.0" in found.table
    assert "blocks that were not named are in every picture but the first: output_blocks.1" in found.table
    assert "2 keys are for text encoders" in found.table and "2 keys left out" in found.table
    for options, what in (
        (dict(blocks="mid"), "blocks: the LoRA changes none of these; it changes input_blocks.1, output_blocks.1"),
        (dict(blocks="inn"), "blocks: there is no block 'inn'"),
        (dict(strength=0.0), "strength is 0.0: the LoRA would change nothing"),
        (dict(strength=math.nan), "strength is nan"),
        (dict(mode="x"), "mode: 'x' is none; choose one of without"),
        (dict(sampler_name="x"), "sampler_name: 'x' is none"),
        (dict(scheduler="x"), "scheduler: 'x' is none"),
        (dict(thumbnail=10_000), "thumbnail is 10000, expected 64 to 512"),
        (dict(max_pictures=10_000), "max_pictures is 10000"),
        (dict(steps=0), "steps is 0"),
        (dict(denoise=-1.0), "denoise is -1.0"),
        (dict(denoise=0.0), "denoise is 0: nothing would be sampled"),
        (dict(cfg=math.nan), "cfg is nan"),
    ):
        with pytest.raises(ValueError, match=re.escape(what)):
            analysed(model, "sd15", vaes["sd15"], tensors, **options)


def test_adapters_of_other_kinds(vaes):
    """Norms and biases, which are no products, and families with arithmetic of their own."""
    model, vae = tiny.tiny("sd15"), vaes["sd15"]
    for family, options in (("LoHa", {}), ("full", {"bias": True}), ("LoRA", {"dora": "output"})):
        _, tensors = lora_on(model, family, options, seed=len(family), every=8, size=0.03)
        found = analysed(model, "sd15", vae, tensors, blocks="mid, base", granularity=GROUP)
        assert torch.equal(found.pictures[0], picture(model, "sd15", vae))
        branched, fused = (apply_lora(model, None, tensors, engine=engine)[0] for engine in (BRANCH, "fuse"))
        assert torch.equal(found.pictures[1], picture(branched, "sd15", vae))
        assert relative(found.pictures[1], picture(fused, "sd15", vae)) < 1e-4


def test_videos_show_their_first_frame(vaes):
    model, vae = tiny.tiny("wan"), vaes["flux"]
    _, tensors = lora_on(model, every=5)

    class Frames:
        """As the host's video VAEs give them: (1, frames, height, width, 3)."""

        def decode(self, samples):
            return torch.stack([vae.decode(samples[:, :, frame]) for frame in range(samples.shape[2])], 1)

    latent = {"samples": torch.zeros(1, 16, 2, 8, 8)}
    found = analysed(model, "wan", Frames(), tensors, latent)
    assert found.pictures.ndim == 4 and "the first of 2 frames is shown" in found.table


def test_of_videos_little_is_kept(vaes):
    """Two whole ones, to compare with, and the one that is decoded just now; first frames of the others."""
    model, name, frames = tiny.tiny("sd15"), "sd15", 40
    _, tensors = lora_on(model, every=4)
    held, given = [], []

    class Frames:
        def decode(self, samples):
            pixels = vaes[name].decode(samples)[:, None].repeat(1, frames, 1, 1, 1)
            pixels += torch.linspace(0, 0.2, frames)[None, :, None, None, None]
            alike = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.device == pixels.device]
            storages = [o.untyped_storage() for o in alike if o.layout is torch.strided]
            held.append(len({s.data_ptr() for s in storages if s.nbytes() >= pixels.untyped_storage().nbytes()}))
            given.append(np.array(pixels.double().clamp(0, 1)))
            return pixels

    found = analysed(model, name, Frames(), tensors)
    assert len(found.pictures) == len(given) > 6 and max(held) - held[0] <= 3
    base, whole, *others = given
    for row, own in zip(list(rows(found.table).values())[2:], others, strict=True):
        assert row[:2] == pytest.approx([np.abs(own - whole).mean(), np.abs(own - base).mean()], abs=1.1e-5)


# ---------------------------------------------------------------- the node


def test_in_a_graph(tmp_path, monkeypatch):
    known = dict(folder_paths.folder_names_and_paths) | {"loras": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    _, tensors = lora_on(graph.tiny_model("sd15"), every=4)
    save_tensors(tensors, tmp_path / "cat.safetensors")
    schema = LoomBlockAnalyser.define_schema()
    options = {field.id: field.default for field in schema.inputs if getattr(field, "default", None) is not None}
    prompt = {
        "1": node("TinySource", family="sd15"),
        "2": node("CLIPTextEncode", clip=["1", 1], text="a cat"),
        "3": node("EmptyLatentImage", width=64, height=48, batch_size=1),
        "4": node("LoomBlockAnalyser", model=["1", 0], positive=["2", 0], negative=["2", 0], latent_image=["3", 0],
                  vae=["1", 2], **{**options, "lora_name": "cat.safetensors", "steps": 2, "thumbnail": 96}),
        **{name: node("Keep", value=["4", number]) for number, name in enumerate(("sheet", "pictures", "table"))},
    }  # fmt: skip
    running = Graph()
    kept = running.run(prompt)
    count = len(rows(kept["table"]))
    assert kept["pictures"].shape == (count, 48, 64, 3) and kept["sheet"].shape[0] == 1 and kept["sheet"].shape[3] == 3
    assert 0 <= kept["sheet"].min() < kept["sheet"].max() <= 1 and kept["table"].startswith("cat.safetensors: ")
    running.run(prompt)
    assert "4" not in running.ran
    prompt["4"]["inputs"]["lora_name"] = "(from the lora socket)"
    with pytest.raises(GraphError, match="lora_name: choose a file"):
        running.run(prompt)


@pytest.mark.parametrize("value", [None, 3, "", "../../x", ["1", 0], "run: x", "x" * 5000])
def test_fingerprints_never_raise(value):
    assert isinstance(LoomBlockAnalyser.fingerprint_inputs(lora_name=value), str | float)


def test_the_page_says_what_there_is():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "web/docs/LoomBlockAnalyser.md").read_text()
    for field in LoomBlockAnalyser.define_schema().inputs:
        assert f"**{field.id}**" in page
