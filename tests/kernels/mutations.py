"""Damaged and hostile adapter files, by mutation of good ones.

``mutated(file, draws)`` changes bytes, the header's length, entries of the header or single tensors of a good file.
``check(path)`` reads it every way there is: whatever comes, it is an answer or a ValueError that names the file.

Shared by the tests and by ``dev/soak.py``.
"""

import json
import random
import tracemalloc

import safetensors.torch
import torch

from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.safetensors_io import load_tensors, read_metadata

WORDS = (
    *("lora_down.weight", "lora_A.x.weight", "lora_mid.weight", "alpha", "hada_w1_a", "lokr_w2", "oft_blocks", "diff"),
    *("dora_scale", "oft_R.weight", "ia3_l", "weight", "on_input", "vera_lambda_b", "w_norm", "reshape_weight"),
    *("set_weight", "boft_R", "boft_s", "a1.weight", "rescale", "oft_blocks.1", "lora_magnitude_vector"),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "F4", "", None, 7)
DTYPES_OF_TENSORS = (torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.float64)
VALUES = (0, 1, -1, 2**31, 2**63, 2**64, 1e300, True, None, "", "x", [], {}, [[]], "\ud800")


def good_files(shapes):
    """Contents of files of several dialects and families for layers "one" and "two" of the given shapes."""
    (out, inner), draws = shapes, torch.Generator().manual_seed(0)

    def random_tensor(*sizes):
        return torch.randn(sizes, generator=draws)

    kohya = {
        "lora_unet_one.lora_down.weight": random_tensor(2, inner),
        "lora_unet_one.lora_up.weight": random_tensor(out, 2),
        "lora_unet_one.alpha": torch.tensor(1.0),
        "lora_unet_one.dora_scale": random_tensor(out, 1),
        "lora_unet_two.hada_w1_a": random_tensor(out, 2),
        "lora_unet_two.hada_w1_b": random_tensor(2, inner),
        "lora_unet_two.hada_w2_a": random_tensor(out, 2),
        "lora_unet_two.hada_w2_b": random_tensor(2, inner),
    }
    lycoris = {
        "lycoris_one.lokr_w1": random_tensor(2, 2),
        "lycoris_one.lokr_w2_a": random_tensor(out // 2, 1),
        "lycoris_one.lokr_w2_b": random_tensor(1, inner // 2),
        "lycoris_one.alpha": torch.tensor(float("inf")),
        "lycoris_two.oft_blocks": random_tensor(out // 2, 2, 2),
        "lycoris_two.alpha": torch.tensor(0.1),
        "lycoris_two.diff_b": random_tensor(out),
    }
    peft = {
        "base_model.model.one.lora_A.mine.weight": random_tensor(2, inner).half(),
        "base_model.model.one.lora_B.mine.weight": random_tensor(out, 2).half(),
        "base_model.model.one.lora_B.mine.bias": random_tensor(out).half(),
        "base_model.model.two.oft_R.weight": random_tensor(inner // 2, 1).bfloat16(),
        "bundle_emb.sks.clip_l": random_tensor(2, 4),
    }
    config = {"r": 2, "lora_alpha": 4, "alpha_pattern": {"one": 3}, "rank_pattern": {}}
    return [
        safetensors.torch.save(kohya, {"ss_network_args": '{"rs_lora": "True"}'}),
        safetensors.torch.save(lycoris),
        safetensors.torch.save(peft, {"adapter_config": json.dumps(config)}),
    ]


def mutated(content: bytes, draws: random.Random) -> bytes:
    """One or several of the mutations below."""
    for _ in range(draws.choice((1, 1, 2, 4))):
        content = draws.choice(MUTATIONS)(content, draws)
    return content


def _bytes(content, draws):
    changed = bytearray(content)
    for _ in range(draws.choice((1, 4, 32))):
        if changed:
            changed[draws.randrange(len(changed))] = draws.randrange(256)
    return bytes(changed)


def _cut(content, draws):
    return content[: draws.randrange(len(content) + 1)]


def _grown(content, draws):
    place = draws.randrange(len(content) + 1)
    return content[:place] + draws.randbytes(draws.choice((1, 8, 100))) + content[place:]


def _length(content, draws):
    return draws.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1, draws.randrange(4000))).to_bytes(8, "little") + content[8:]


def _start(content, draws):
    return draws.choice((b"PK\x03\x04", b"\x80\x02", b"GGUF", b"<html>", b"", b"\x00" * 20)) + content[8:]


def _entry(content, draws):
    """The header still parses; one thing in it is another."""
    split = _split(content)
    if split is None:
        return content
    header, data = split
    name = draws.choice(list(header) or ["x"])
    entry = header.get(name)
    what = draws.randrange(7)
    if what == 0 or not isinstance(entry, dict):
        header[name] = draws.choice(VALUES)
    elif what == 1:
        entry["dtype"] = draws.choice(DTYPES)
    elif what == 2:
        entry["shape"] = draws.choice(([], [0], [2, -2], [2**40, 2**40], [1] * 40, None, [1.5], [3, 4], [4, 3]))
    elif what == 3:
        entry["data_offsets"] = draws.choice(([0, 0], [0, 2**50], [8, 4], [0], None, [0, 32], [-4, 4]))
    elif what == 4:
        header["__metadata__"] = draws.choice(({"a": 1}, [], "x", {"adapter_config": "[" * 3000}, {"": ""}, None))
    elif what == 5:
        header[name.rpartition(".")[0] + "." + draws.choice(WORDS)] = header.pop(name)
    else:
        header[draws.choice((".", "", "a" * 5000, "é\x00", "lora_unet_one." * 50, ".alpha", "base_model"))] = entry
    return _joined(header, data)


def _tensor(content, draws):
    """A good file with a tensor of another shape, dtype or value, or under another name."""
    try:
        tensors = dict(safetensors.torch.load(content))
    except Exception:  # mutated before
        return content
    if not tensors:
        return content
    name = draws.choice(list(tensors))
    tensor = tensors[name]
    what = draws.randrange(6)
    if what == 0 and tensor.is_floating_point():
        value = draws.choice((float("nan"), float("inf"), 3e38, 0.0))
        tensors[name] = torch.full(tensor.shape, value, dtype=torch.float64).to(tensor.dtype)
    elif what == 1:
        tensors[name] = tensor.to(draws.choice(DTYPES_OF_TENSORS))
    elif what == 2:
        tensors[name] = tensor.flatten()
    elif what == 3:
        sizes = [draws.choice((0, 1, 2, 3, 4, 7)) for _ in range(draws.randrange(6))]
        tensors[name] = torch.ones(sizes)
    elif what == 4:
        tensors[name] = tensor[:1].contiguous() if tensor.ndim else tensor
    else:
        tensors[name.partition(".")[0] + "." + draws.choice(WORDS)] = tensors.pop(name)
    return safetensors.torch.save(tensors)


MUTATIONS = (_bytes, _cut, _grown, _length, _start, _entry, _entry, _entry, _tensor, _tensor, _tensor, _tensor)


def _split(content):
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
    except (ValueError, RecursionError, OverflowError):
        return None
    return (header, content[end:]) if isinstance(header, dict) else None


def _joined(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def check(path, targets) -> str:
    """How reading went: "read", or "refused". Anything else than a ValueError naming the file comes through."""
    outcome = "read"
    for act in (read_metadata, load_tensors, read_lora, lambda path: read_lora(path, targets)):
        try:
            result = act(path)
        except ValueError as error:
            assert path.name in str(error), error
            assert len(str(error)) < 2000
            outcome = "refused"
            continue
        if isinstance(result, LoRAFile):
            _use(result, targets)
    return outcome


def _use(file, targets):
    """What was read can be used: merged, or refused for this weight; and every key has its place or its reason."""
    for name, adapter in file.adapters.items():
        assert all(torch.isfinite(t.float()).all() for t in adapter.tensors.values() if t.is_floating_point())
        if name in targets:
            weight = torch.ones(targets[name])
            merged = adapter.merged(weight)
            assert merged.shape[0] == weight.shape[0]
    for item in file.unplaced:
        assert item.reason and item.detail


def peak_bytes(act) -> int:
    """The most Python memory in use during ``act()``."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
