"""Latents from the VAE's distribution, and latents from disk: never other ones than encoding anew would give."""

import dataclasses
import os

import comfy.ldm.lightricks.vae.causal_video_autoencoder as lightricks
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.model_patcher
import comfy.taesd.taesd
import folder_paths
import numpy as np
import pytest
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from PIL import Image

import tiny
from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host.distributions import encode_moments, has_distribution
from lora_loom.host.examples import HostExamples
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.dataset.model import GraphPicture, Sample
from lora_loom.training.loop import generator
from lora_loom.training.options import OptionError
from lora_loom.training.settings import OptimizerSettings, Plan, RunSettings
from training import opened

DISK = RunSettings(latent_cache="disk")
SAMPLED = RunSettings(sample_latents=True)
MEMORY = RunSettings()


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path / "user"


@pytest.fixture
def folder(tmp_path):
    return images(tmp_path / "zorb", count=3)


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        return tiny_model("sd15"), clip_for("sd15"), vae_for("sd15")


def examples_of(dataset, parts, run=MEMORY, seed=3, steps=20):
    plan = Plan(run=run, optimizer=OptimizerSettings(gradient_accumulation=1))
    examples = HostExamples(dataset, BatchPlan(dataset, 1, seed), *parts, plan, steps)
    with torch.inference_mode():
        examples.prepare(0, lambda count: lambda: None)
    return examples


def batches(examples, count=20):
    return [examples.batch(position) for position in range(count)]


def alike(one, other):
    """Bit for bit: latents, masks and what the model is told of the crop."""
    return all(
        torch.equal(a.latents, b.latents)
        and (a.masks is None) == (b.masks is None)
        and (a.masks is None or torch.equal(a.masks, b.masks))
        and [c.crop for c in a.conditioning] == [c.crop for c in b.conditioning]
        for a, b in zip(one, other, strict=True)
    )


def with_images(dataset, **options):
    concepts = (dataclasses.replace(c, images=dataclasses.replace(c.images, **options)) for c in dataset.concepts)
    return dataclasses.replace(dataset, concepts=tuple(concepts))


def over(network, latent_dim=2):
    """The host's VAE object around a network of its own that no loader is needed for."""
    vae = tiny.tiny_vae(inference=True)
    vae.first_stage_model, vae.latent_dim = network.eval(), latent_dim
    vae.patcher = comfy.model_patcher.ModelPatcher(network, vae.patcher.load_device, vae.patcher.offload_device)
    return vae


# ---------------------------------------------------------------- the distribution


LIGHTRICKS = {
    **{"_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3},
    "latent_channels": 128,
    **{"blocks": [["res_x", 1], ["compress_all", 1], ["compress_all", 1], ["compress_all", 1]], "scaling_factor": 1.0},
    **{"norm_layer": "pixel_norm", "patch_size": 4, "latent_log_var": "uniform", "use_quant_conv": False},
    "causal_decoder": False,
}


def vaes():
    draws = torch.Generator().manual_seed(0)
    normed = tiny.fill(AutoencoderKL(ddconfig={**tiny.VAE_CONFIG, "batch_norm_latent": True}, embed_dim=4))
    normed.bn.running_mean.normal_(generator=draws)
    normed.bn.running_var.uniform_(0.5, 2.0, generator=draws)
    return {
        "KL": tiny.tiny_vae(inference=True),
        "16 channels": vae_for("flux"),
        "normed": over(normed),
        "wan": over(tiny.fill(comfy.ldm.wan.vae.WanVAE(dim=8, z_dim=16)), 3),
        "wan 2.2": over(tiny.fill(comfy.ldm.wan.vae2_2.WanVAE(dim=8, dec_dim=8, z_dim=16)), 3),
        "lightricks": over(_lightricks(draws), 3),
    }


def _lightricks(draws):
    network = tiny.fill(lightricks.VideoVAE(config=LIGHTRICKS))
    statistics = network.per_channel_statistics
    for name, value in statistics.named_buffers():
        value.uniform_(0.5, 1.5, generator=draws) if "std" in name else value.normal_(generator=draws)
    return network


NAMES = ("KL", "16 channels", "normed", "wan", "wan 2.2", "lightricks")


@pytest.fixture(scope="module")
def every_vae():
    with torch.inference_mode():
        return vaes()


def moments_of(vae, image):
    """(mean, deviation) in closed form, from the network's own layers."""
    network = vae.first_stage_model
    pixels = image.movedim(-1, 1) * 2 - 1
    if isinstance(network, AutoencoderKL):
        mean, log_variance = network.quant_conv(network.encoder(pixels)).chunk(2, 1)
        deviation = (log_variance / 2).exp()
        if network.bn is None:
            return mean, deviation
        both = torch.stack([mean, deviation])  # each channel's four neighbours become channels
        mean, deviation = torch.nn.functional.pixel_unshuffle(both, 2)
        variance = (network.bn.running_var + network.bn_eps).view(-1, 1, 1)
        return (mean - network.bn.running_mean.view(-1, 1, 1)) / variance.sqrt(), deviation / variance.sqrt()
    frame = pixels.unsqueeze(2)
    if isinstance(network, lightricks.VideoVAE):
        mean, log_variance = network.encoder(frame).chunk(2, 1)
        statistics = dict(network.per_channel_statistics.named_buffers())
        centre, length = (statistics[name].view(-1, 1, 1, 1) for name in ("mean-of-means", "std-of-means"))
        return (mean - centre) / length, (log_variance / 2).exp() / length
    if isinstance(network, comfy.ldm.wan.vae2_2.WanVAE):
        frame = comfy.ldm.wan.vae2_2.patchify(frame, patch_size=2)
    mean, log_variance = network.conv1(network.encoder(frame)).chunk(2, 1)
    return mean, (log_variance / 2).exp()


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_the_moments_are_those_of_the_network(every_vae, name):
    vae = every_vae[name]
    image = torch.rand(1, 64, 96, 3)
    latent, log_variance = encode_moments(vae, image)
    assert torch.equal(latent, vae.encode(image)), "the host's own latent, and nothing left behind in the VAE"
    mean, deviation = moments_of(vae, image)
    assert torch.allclose(latent, mean, rtol=1e-4, atol=1e-5)
    assert torch.allclose((log_variance / 2).exp(), deviation, rtol=1e-4, atol=1e-6)
    assert deviation.std() > 1e-3


@torch.inference_mode()
def test_the_moments_are_those_of_diffusers(every_vae):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = every_vae["KL"]
    peer = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=4,
    )
    weights = {name: value.clone() for name, value in vae.first_stage_model.state_dict().items()}
    peer.load_state_dict(convert_ldm_vae_checkpoint(weights, peer.config))
    image = torch.rand(1, 64, 96, 3)
    expected = peer.encode(image.movedim(-1, 1) * 2 - 1).latent_dist
    latent, log_variance = encode_moments(vae, image)
    assert torch.allclose(latent, expected.mean, atol=1e-5)
    assert torch.allclose(log_variance, expected.logvar, atol=1e-5)


@torch.inference_mode()
def test_a_tiled_encode_has_moments_too(every_vae, monkeypatch):
    """Out of memory the host encodes in overlapping tiles, which know less of their surroundings, and blends them."""
    vae = every_vae["KL"]
    image = torch.rand(1, 64, 64, 3)
    whole = encode_moments(vae, image)
    monkeypatch.setattr(vae, "encode", lambda pixels: vae.encode_tiled(pixels, tile_x=64, tile_y=64, overlap=16))
    latent, log_variance = encode_moments(vae, image)
    assert torch.equal(latent, vae.encode(image))
    for tiled, expected in zip((latent, log_variance), whole, strict=True):
        assert 0.05 < (tiled - expected).std() / expected.std() < 0.5
        assert torch.corrcoef(torch.stack([tiled.flatten(), expected.flatten()]))[0, 1] > 0.85


@pytest.mark.parametrize("family, name", [("sd15", "KL"), ("flux", "16 channels"), ("wan", "wan")])
def test_fresh_latents_are_drawn_around_the_mean(folder, every_vae, family, name):
    """Scaled as the model wants them: the mean is the latent of runs that do not draw, the spread its deviation."""
    patcher, vae = tiny.tiny(family, inference=True), every_vae[name]
    loaded, dataset = (patcher, clip_for("sd15"), vae), opened(folder, 64, 16)
    steps = 400
    drawn = examples_of(dataset, loaded, SAMPLED, steps=steps)
    plain = examples_of(dataset, loaded, MEMORY)
    pictures = list(drawn._pictures.items())
    assert all(torch.equal(plain._pictures[key].latent, picture.latent) for key, picture in pictures)

    scale, checked = patcher.model.process_latent_in, 0
    for (index, _), picture in pictures:
        item = drawn.order.items[index]
        with torch.inference_mode():
            image = Image.open(dataset.samples[item.sample].picture.path)
            pixels = torch.from_numpy(np.asarray(image).copy())[None] / 255
            if pixels.shape[1:3] != item.bucket[::-1]:
                continue
            checked += 1
            mean, deviation = moments_of(vae, pixels)
            assert torch.allclose(picture.latent, scale(mean), rtol=1e-3, atol=1e-4)
            assert torch.allclose(picture.deviation, scale(mean + deviation) - scale(mean), rtol=1e-2, atol=1e-4)

    assert checked
    draws: dict = {}
    for position in range(steps):
        [member] = drawn.order.batch(position)
        picture = drawn._pictures[member.item, member.variation]
        latent = drawn.batch(position).latents
        assert torch.equal(latent, drawn.batch(position).latents), "the same whenever it is asked for"
        noise = torch.randn(latent.shape, generator=generator(3, "latent", position))
        assert torch.equal(latent, picture.latent + picture.deviation * noise)
        draws.setdefault(member.item, []).append((latent - picture.latent) / picture.deviation)
    for found in draws.values():
        unit = torch.stack(found)
        assert abs(unit.mean()) < 0.02 and abs(unit.std() - 1) < 0.02
        assert len({value.item() for value in unit[:, 0].flatten(1)[:, 0]}) == len(found)
    assert drawn.validation() == []


def test_a_vae_without_a_distribution_cannot_be_drawn_from(folder, parts):
    tiny_coder = over(tiny.fill(comfy.taesd.taesd.TAESD(latent_channels=4)))
    for vae in (tiny.pixel_vae(), tiny_coder):
        assert not has_distribution(vae)
        with pytest.raises(OptionError, match=r"sample_latents is True, expected False: this VAE \((Pixel|TAESD)"):
            examples_of(opened(folder, 64, 16), (*parts[:2], vae), SAMPLED)
    examples_of(opened(folder, 64, 16), (*parts[:2], tiny_coder))


# ---------------------------------------------------------------- on disk


def cached(dataset, parts, run=DISK, seed=3):
    """(hits, misses) of a run that keeps its latents on disk; they are those of a run that does not."""
    examples = examples_of(dataset, parts, run, seed)
    expected = examples_of(dataset, parts, dataclasses.replace(run, latent_cache="memory"), seed)
    assert alike(batches(examples), batches(expected)), "stale, or changed on the way"
    return examples._disk.hits, examples._disk.misses


def test_latents_are_encoded_once_for_all_runs(folder, parts, user_folder):
    dataset = opened(folder, 64, 16)
    assert cached(dataset, parts) == (0, 3)
    assert cached(dataset, parts) == (3, 0)
    assert cached(dataset, parts, seed=9) == (3, 0), "nothing is left to chance here, so the seed changes nothing"
    assert cached(opened(folder, 64, 16), parts) == (3, 0)
    files = list(user_folder.rglob("*.safetensors"))
    assert len(files) == 3 and all(path.parent.name == path.name[:2] for path in files)
    assert {path.relative_to(user_folder).parts[:2] for path in files} == {("__lora_loom", "cache")}
    assert "on disk, 0 were not" in examples_of(dataset, parts, DISK).notes()[0]
    assert cached(dataset, (parts[0], parts[1], vae_for("sd15"))) == (3, 0), "an equal VAE is the same VAE"


def test_whatever_changes_a_picture_is_encoded_anew(folder, parts):
    dataset = opened(folder, 64, 16)
    assert cached(dataset, parts) == (0, 3)
    path = folder / "1.png"
    status = os.stat(path)
    pixels = np.asarray(Image.open(path)).copy()
    pixels[5, 7, 1] ^= 128
    Image.fromarray(pixels).save(path)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * max(0, status.st_size - len(content)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # even if the file looks as it did
    assert cached(opened(folder, 64, 16), parts) == (2, 1)
    os.rename(folder / "2.png", folder / "9.png")
    os.rename(folder / "2.txt", folder / "9.txt")
    assert cached(opened(folder, 64, 16), parts) == (3, 0), "its name is not its content"

    assert cached(opened(folder, 96, 16), parts) == (0, 3), "another resolution"
    assert cached(opened(folder, 64, 16), parts) == (3, 0)
    # one of two variations is as before
    assert cached(with_images(opened(folder, 64, 16), flip=True), parts) == (3, 3)
    for options in ({"brightness": 0.3, "variations": 2}, {"rotate": 20.0, "variations": 2}):
        assert cached(with_images(opened(folder, 64, 16), **options), parts) == (0, 6)
        assert cached(with_images(opened(folder, 64, 16), **options), parts) == (6, 0)
        assert cached(with_images(opened(folder, 64, 16), **options), parts, seed=8) == (0, 6)
    wide = with_images(opened(folder, 64, 64), crop="random", variations=2)
    hits, misses = cached(wide, parts)
    assert misses > 0 and cached(wide, parts) == (hits + misses, 0)
    focused = opened(folder, 64, 64)
    focused = focused.with_samples(dataclasses.replace(s, focus=(0.0, 0.0, 0.2, 0.1)) for s in focused.samples)
    middle = cached(opened(folder, 64, 64), parts)
    assert sum(middle) == 3
    hits, misses = cached(with_images(focused, crop="focus"), parts)
    assert misses >= 1 and hits + misses == 3


def test_masks_are_part_of_what_is_kept(folder, parts):
    dataset = opened(folder, 64, 16)
    assert cached(dataset, parts) == (0, 3)

    def masked(level, **options):
        for path in folder.glob("?.png"):
            mask = np.full(np.asarray(Image.open(path)).shape[:2], level, np.uint8)
            mask[:20] = 255
            Image.fromarray(mask).save(path.with_name(f"{path.stem}-masklabel.png"))
        return with_images(opened(folder, 64, 16), **options)

    assert cached(masked(10), parts) == (0, 3)
    assert cached(masked(10), parts) == (3, 0)
    assert cached(masked(90), parts) == (0, 3)
    for options in ({"mask_floor": 0.3}, {"invert_mask": True}):
        assert cached(masked(90, **options), parts) == (0, 3)
    transparent = np.random.default_rng(0).integers(0, 255, (64, 64, 4), dtype=np.uint8)
    Image.fromarray(transparent).save(folder / "0.png")
    assert cached(masked(90), parts) == (2, 1)
    assert cached(masked(90, background="#ff0000"), parts) == (0, 3)
    assert cached(masked(90, alpha_mask=True), parts) == (0, 3)


def test_pictures_of_the_graph_are_known_by_their_pixels(folder, parts):
    dataset = opened(folder, 64, 16)
    pixels = torch.rand(64, 64, 3)
    one = dataset.with_samples([Sample("made", GraphPicture(pixels), "made")])
    assert cached(one, parts) == (0, 1)
    again = dataset.with_samples([Sample("other name", GraphPicture(pixels.clone()), "made")])
    assert cached(again, parts) == (1, 0)
    pixels[3, 4, 1] = 1 - pixels[3, 4, 1]
    assert cached(dataset.with_samples([Sample("made", GraphPicture(pixels), "made")]), parts) == (0, 1)


def test_another_vae_encodes_anew(folder, parts):
    patcher, clip, _ = parts
    dataset = opened(folder, 64, 16)

    def vae(change=None):
        made = tiny.tiny_vae(inference=True)
        if change:
            with torch.inference_mode():
                change(made)
        return patcher, clip, made

    assert cached(dataset, vae()) == (0, 3)
    assert cached(dataset, vae()) == (3, 0)

    def one_weight(made):
        made.first_stage_model.encoder.mid.block_1.conv1.weight[3, 5, 1, 2] += 0.05

    assert cached(dataset, vae(one_weight)) == (0, 3)

    def precision(made):
        made.vae_dtype = torch.bfloat16
        made.first_stage_model.to(torch.bfloat16)

    assert cached(dataset, vae(precision)) == (0, 3)
    assert cached(dataset, (patcher, clip, tiny.tiny_vae(1, inference=True))) == (0, 3)

    def patched(made):
        weight = "encoder.conv_in.weight"
        difference = torch.ones_like(made.first_stage_model.state_dict()[weight])
        made.patcher.add_patches({weight: (difference,)}, 0.1)

    assert cached(dataset, vae(patched)) == (0, 3)
    assert cached(dataset, vae(patched)) == (3, 0)
    assert cached(dataset, vae()) == (3, 0)


def test_what_is_drawn_from_is_kept_too(folder, parts):
    dataset = opened(folder, 64, 16)
    drawn = dataclasses.replace(DISK, sample_latents=True)
    assert cached(dataset, parts) == (0, 3)
    assert cached(dataset, parts, drawn) == (0, 3)
    assert cached(dataset, parts, drawn) == (3, 0)


def test_another_models_scale_is_put_on_afterwards(folder, every_vae):
    """One entry serves every model that takes this VAE."""
    dataset, loaded = opened(folder, 64, 16), (tiny.tiny("flux", inference=True), clip_for("sd15"))
    vae = every_vae["16 channels"]
    assert cached(dataset, (*loaded, vae)) == (0, 3)
    assert cached(dataset, (tiny.tiny("sd3", inference=True), loaded[1], vae)) == (3, 0)
    with pytest.raises(ValueError, match="makes latents with 16 channels, the MODEL wants 4"):
        examples_of(dataset, (tiny_model("sd15"), loaded[1], vae), DISK)


def test_a_damaged_entry_is_encoded_anew(folder, parts, user_folder):
    dataset = opened(folder, 64, 16)
    assert cached(dataset, parts) == (0, 3)
    for path in user_folder.rglob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    assert cached(dataset, parts) == (0, 3)
    assert cached(dataset, parts) == (3, 0)


def test_a_file_that_changes_while_it_is_encoded_is_not_kept(folder, parts, monkeypatch, user_folder):
    """The key says what the file was when it was asked for."""
    patcher, clip, vae = parts
    encode, path = vae.encode, folder / "0.png"

    def changed_meanwhile(pixels):
        with open(path, "ab") as file:  # never empty in between: a thread reads ahead
            file.write(b"more")
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", changed_meanwhile)
    examples_of(opened(folder, 64, 16), parts, DISK)
    assert len(list(user_folder.rglob("*.safetensors"))) == 2


def test_a_run_from_disk_ends_with_the_same_bits(folder, parts):
    dataset = with_images(opened(folder, 64, 16), flip=True, brightness=0.2)
    plan = Plan(length=4, rank=2, alpha=2.0, batch_size=2, seed=3, learning_rate=1e-2)
    results = []
    for number, run in enumerate((MEMORY, DISK, DISK)):
        with torch.inference_mode():
            request = Request(*parts, dataset, dataclasses.replace(plan, run=run), f"latents {number}", "new")
            results.append(train(request))
    assert "note: 6 encoded pictures and captions were on disk, 0 were not" in results[2].report
    for other in results[1:]:
        assert other.losses == results[0].losses
        assert all(torch.equal(other.lora[name], tensor) for name, tensor in results[0].lora.items())
