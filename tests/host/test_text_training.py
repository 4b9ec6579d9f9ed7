"""Text encoders that learn: the host's own values, right gradients, a CLIP that comes back as it was."""

import comfy.model_management
import pytest
import torch

from graph import tiny_model
from lora_loom.host.apply import apply_lora
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.loan import borrow
from lora_loom.host.text_loan import LiveText, borrow_text, text_components, trainable_clip
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.writing import to_state_dict
from lora_loom.training.loop import Trainer
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ComponentSettings, OptimizerSettings, Plan
from snapshot import Snapshot
from tiny_text import CLIPS, TextExamples, components_for, encoded, tensors_of

ENCODERS = {"sd15": 1, "sdxl": 2, "flux": 2, "qwen": 1}
PROMPTS = ("a (photo:1.3) of (one), [two]", "", " ".join(f"w{n}" for n in range(90)))
WORDS = "my_cat: 3 fluffy cat"


def loss_of(live, captions):
    """A number that every part of what the model is told has a say in."""
    total = 0.0
    for index, (context, extras) in enumerate(live.encode(captions)):
        draws = torch.Generator().manual_seed(index)
        for part in (context, extras.get("pooled_output")):
            if part is not None:
                total = total + (part * torch.randn(part.shape, generator=draws)).sum() / part.numel() ** 0.5
    return total


# -- values


@pytest.mark.parametrize("skip", (None, -2), ids=("whole", "clip skip 2"))
@pytest.mark.parametrize("name", CLIPS)
def test_captions_are_encoded_as_the_host_does(name, skip):
    clip = CLIPS[name](inference=True)
    clip.clip_layer(skip)
    own, components = components_for(clip, rates=[1e-3] * ENCODERS[name], words=WORDS, filled=False)
    live = LiveText(own, components)
    with borrow_text(live):
        found = live.encode(PROMPTS)
    assert any(context.requires_grad for context, _ in found)
    for prompt, (context, extras) in zip(PROMPTS, found, strict=True):
        wanted, more = encoded(clip, prompt)
        assert torch.equal(context, wanted), prompt
        assert extras.keys() == more.keys()
        for key, value in more.items():
            assert value is extras[key] is None or torch.equal(extras[key], value), key


@pytest.mark.parametrize("name", CLIPS)
def test_what_is_learned_acts_as_it_will_from_the_file(name):
    """The adapters hanging on the encoders, and the host merging the same ones, which rounds them to its float16."""
    clip = CLIPS[name](inference=True)
    own, components = components_for(clip, rates=[1e-3] * ENCODERS[name])
    live = LiveText(own, components)
    with borrow_text(live), torch.no_grad():
        found = live.encode(PROMPTS)
    names = NameTable.of(clip.cond_stage_model)
    adapters = {path: adapter for part in components for path, adapter in part.adapters.items()}
    state = to_state_dict(adapters, names.write)
    _, trained, applied = apply_lora(tiny_model("sd15"), clip, state)
    assert applied.clip_weights == len(adapters) and not applied.unplaced
    for prompt, (context, _) in zip(PROMPTS, found, strict=True):
        wanted, before = encoded(trained, prompt)[0], encoded(clip, prompt)[0]
        effect = (wanted - before).norm()
        assert effect > 0.01 * before.norm() and (context - wanted).norm() < 0.01 * effect, prompt


# -- gradients


def test_values_and_gradients_are_those_of_transformers_and_peft_in_double_precision():
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPS["sd15"]()
    own, components = components_for(clip, rates=[1e-3])
    live = LiveText(own, components)
    with borrow_text(live):
        [(context, extras)] = live.encode(["a photo of one"])
    probe = torch.randn(context.shape)
    (context * probe).sum().backward()

    encoder = clip.cond_stage_model.clip_l
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    theirs = CLIPTextModel(CLIPTextConfig(**sizes, hidden_act="quick_gelu", eos_token_id=49407)).double()
    weights = {n: w.double() for n, w in encoder.transformer.text_model.state_dict().items()}
    root = "text_model." if any(name.startswith("text_model.") for name in theirs.state_dict()) else ""
    missing = theirs.load_state_dict({root + name: w for name, w in weights.items()}, strict=False)
    assert not missing.unexpected_keys and not [k for k in missing.missing_keys if "position_ids" not in k]
    layers = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    model = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=16.0, target_modules=layers)).double()
    modules = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    adapters = components[0].adapters
    pairs = {path: modules[root + path.removeprefix("clip_l.transformer.text_model.")] for path in adapters}
    assert len(modules) == len(adapters) == 12
    with torch.no_grad():
        for path, module in pairs.items():
            module.lora_A["default"].weight.copy_(adapters[path].down)
            module.lora_B["default"].weight.copy_(adapters[path].up)
    tokens = torch.tensor([[token for token, _ in own.tokenize("a photo of one")["l"][0]]])
    wanted = model(input_ids=tokens).last_hidden_state
    assert (context - wanted).norm() < 1e-5 * wanted.norm()
    (wanted * probe.double()).sum().backward()
    for path, module in pairs.items():
        for ours, name in ((adapters[path].down, "lora_A"), (adapters[path].up, "lora_B")):
            other = getattr(module, name)["default"].weight.grad
            assert (ours.grad - other).norm() < 1e-4 * other.norm(), (path, name)


@pytest.mark.parametrize("name", CLIPS)
def test_gradients_agree_with_finite_differences_checkpointed_or_not(name):
    """Of adapters on every encoder and of embeddings, through emphasis, several chunks, pooled text and clip skip."""
    clip = CLIPS[name](inference=True)
    own, components = components_for(clip, rates=[1e-3] * ENCODERS[name], words=WORDS)
    live, captions = LiveText(own, components), ["a (my_cat:1.4) sits", f"my_cat {PROMPTS[2]}"]
    trained = tensors_of(components)
    found = {}
    for checkpoint in (False, True):
        with borrow_text(live, checkpoint):
            loss_of(live, captions).backward()
        found[checkpoint] = {key: tensor.grad for key, tensor in trained.items() if tensor.grad is not None}
        for tensor in trained.values():
            tensor.grad = None
    gradients = found[False]
    assert gradients.keys() == found[True].keys() and all(torch.equal(g, found[True][k]) for k, g in gradients.items())
    idle = {key for key in trained if key not in gradients}
    assert all(".layers.2." in key for key in idle), "only layers behind the one that is read learn nothing"
    assert not idle or name in ("sdxl", "qwen")

    with torch.no_grad():
        for kind in {_kind(key) for key in gradients}:
            part = [key for key in gradients if _kind(key) == kind]
            slope = torch.stack([gradients[key].norm() for key in part]).norm().item()
            values, small = [], min(1e-3, 0.03 / slope)
            for size in (small, -2 * small):  # along the gradient, there and back across it
                for key in part:
                    trained[key].add_(gradients[key], alpha=size / slope)
                with borrow_text(live):
                    values.append(loss_of(live, captions).item())
            for key in part:
                trained[key].add_(gradients[key], alpha=small / slope)
            assert (values[0] - values[1]) / (2 * small) == pytest.approx(slope, rel=0.01), kind


def _kind(key):
    """One factor of one encoder, or the vectors of one."""
    return key.split(".")[0], key[-2:] if key[-2:] in (".0", ".1") else key


# -- the CLIP comes back


class Boom(RuntimeError):
    pass


def interrupt():
    comfy.model_management.interrupt_current_processing(True)
    comfy.model_management.throw_exception_if_processing_interrupted()


def fail():
    raise Boom


@pytest.mark.parametrize("ending", (None, fail, interrupt), ids=("finishes", "error", "cancelled"))
@pytest.mark.parametrize("name", ("sdxl", "qwen"))
def test_after_every_ending_the_host_finds_the_clip_it_had(name, ending):
    clip = CLIPS[name](inference=True)
    tokenizer = clip.tokenizer
    with torch.inference_mode():
        before_text = encoded(clip, "my_cat (one:1.2)")
        own, components = components_for(clip, rates=[1e-3] * ENCODERS[name], words=WORDS)
        before, live = Snapshot(clip.patcher), LiveText(own, components)
        try:
            with borrow_text(live, checkpoint=True):
                loss = loss_of(live, ["my_cat (one:1.2)"])
                if ending is not None:
                    ending()
                loss.backward()
        except (Boom, comfy.model_management.InterruptProcessingException):
            assert ending is not None
        assert not before.differences(Snapshot(clip.patcher))
        after_text = encoded(clip, "my_cat (one:1.2)")
    assert torch.equal(before_text[0], after_text[0]) and clip.tokenizer is tokenizer


# -- training


@pytest.mark.parametrize("what", ("encoder", "embeddings"))
def test_the_text_alone_lowers_the_loss(what):
    """The model is frozen; the same noise is measured before and after."""
    clip, patcher = CLIPS["sd15"](inference=True), tiny_model("sd15")
    choice = {"rates": [1e-2]} if what == "encoder" else {"words": "my_cat: 32 fluffy cat"}
    own, components = components_for(clip, **choice, filled=False)
    components[0].learning_rate = 1e-2 if what == "encoder" else 0.1
    live = LiveText(own, components)
    examples = TextExamples(live, ["my_cat here", "my_cat my_cat"])
    plan = Plan(optimizer=OptimizerSettings(weight_decay=0.0))

    @torch.no_grad()
    def measured():
        return sum(trainer.loss(position).item() for position in range(20)) / 20

    with borrow_text(live, beside=[patcher]), borrow(patcher, beside=[own.patcher]) as loan:
        trainer = Trainer(components, HostDenoiser(loan), examples, plan, 20)
        before = measured()
        while not trainer.finished:
            trainer.step()
        after = measured()
    assert after < before * 0.995, (before, after)


def test_an_encoder_stops_when_it_is_told_to_and_its_text_is_never_stale():
    clip, patcher = CLIPS["sdxl"](inference=True), tiny_model("sdxl")
    own, components = components_for(clip, rates=[1e-2, 1e-2])
    first, second = components
    first.stop_after = 2
    live = LiveText(own, components)
    plan = Plan(optimizer=OptimizerSettings(weight_decay=0.0))

    class Examples(TextExamples):
        def batch(self, position):
            batch = super().batch(position)
            contexts.append(batch.conditioning[0].cross_attn.detach())
            return batch

    contexts, bits = [], []
    with borrow_text(live, beside=[patcher]), borrow(patcher, beside=[live.clip.patcher]) as loan:
        trainer = Trainer(components, HostDenoiser(loan), Examples(live, ["one"]), plan, 4)
        while not trainer.finished:
            trainer.step()
            bits.append([t.detach().clone() for t in tensors_of([first]).values()])
        second_learns = contexts[3]
        for tensor in tensors_of(components).values():
            tensor.requires_grad_(False)
        [(still, _)] = live.encode(["one"])
        assert not still.requires_grad, "nothing learns any more: no graph is kept"
    same = [all(map(torch.equal, a, b)) for a, b in zip(bits, bits[1:], strict=False)]
    assert same == [False, True, True]
    left = [context[..., :64] for context in contexts]
    right = [context[..., 64:] for context in contexts]
    assert torch.equal(left[2], left[3]) and not torch.equal(left[1], left[2]), "CLIP-L shows what it ended with"
    assert not torch.equal(right[2], second_learns[..., 64:]), "CLIP-G goes on"


def test_a_rate_for_an_encoder_that_is_not_there_is_refused():
    own, _ = trainable_clip(CLIPS["sd15"](inference=True))
    plan = Plan(components=ComponentSettings(te2_learning_rate=1e-5))
    with pytest.raises(OptionError, match="te2_learning_rate is 1e-05, expected 0: this CLIP has te1 clip_l and no"):
        text_components(own, plan)
