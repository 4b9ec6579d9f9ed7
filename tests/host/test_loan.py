"""A loan leaves no trace, whatever ends it and whatever the host does meanwhile."""

import functools

import comfy.model_management
import comfy.sample
import comfy.sd
import pytest
import torch

import tiny
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.loan import WeightsChangedError, borrow
from lora_loom.kernels import lora as lora_kernel
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.writing import to_state_dict
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import OptimizerSettings, Plan
from snapshot import Snapshot, weights
from training import adapters_for, learners, samples_for

management = comfy.model_management
OutOfMemory = management.OOM_EXCEPTION if management.OOM_EXCEPTION is not Exception else torch.OutOfMemoryError


# -- what the host does


def core_lora(patcher, seed):
    """A clone with a LoRA of the host's own, as its loader nodes apply it."""
    adapters = adapters_for(patcher, "attention+MLP", conv=False, seed=seed)
    state = to_state_dict(adapters, NameTable.of(patcher.model).write)
    clone, _ = comfy.sd.load_lora_for_models(patcher, None, state, 0.7, 0)
    assert len(clone.patches) == len(patcher.patches) + len(adapters) or patcher.patches
    return clone


def sample(name, patcher):
    """One step, as a sampler node does it."""
    with torch.inference_mode():
        latent = tiny.latent(name)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
        cond, uncond = tiny.conditioning(name, seed=1), tiny.conditioning(name, seed=2)
        how = (1, 2.0, "euler", "simple")  # steps, guidance, sampler, scheduler
        return comfy.sample.sample(patcher, noise, *how, cond, uncond, latent, seed=3, disable_pbar=True)


def lifecycle(name, patcher):
    """Seven outputs between which the host loads, patches, unpatches and unloads in every order."""
    outputs = [sample(name, patcher)]
    first = core_lora(patcher, 21)
    outputs.append(sample(name, first))
    management.unload_all_models()
    outputs.append(sample(name, patcher))
    second = core_lora(patcher.clone(), 22)
    outputs.append(sample(name, second))
    outputs.append(sample(name, patcher.clone()))
    outputs.append(sample(name, first))
    management.unload_all_models()
    outputs.append(sample(name, patcher))
    return outputs


@functools.cache
def expected(name, patched):
    """The lifecycle of a model that was never lent."""
    return lifecycle(name, model(name, patched))


def model(name, patched):
    """A MODEL as loader nodes hand it over; ``patched``: with a LoRA applied, so that weights are swapped on load."""
    patcher = tiny.tiny(name, inference=True)
    return core_lora(patcher, 20) if patched else patcher


def assert_like_new(name, patched, patcher):
    for number, (got, want) in enumerate(zip(lifecycle(name, patcher), expected(name, patched), strict=True)):
        assert torch.equal(got, want), f"output {number} differs"


# -- what training does


class Examples:
    """Two batches of two samples for ever."""

    def __init__(self, name):
        self.batches = []
        for index in range(2):
            latents, _, _, conditioning = samples_for(name, 2, seed=5 + index, side=8)
            self.batches.append(Batch(latents, conditioning))

    def batch(self, position):
        return self.batches[position % 2]


class Disturbed(HostDenoiser):
    """Runs ``inside`` between forward and backward, and ``backward`` in the middle of backward."""

    inside = backward = staticmethod(lambda: None)

    def predict(self, *args):
        output = super().predict(*args)
        self.inside()
        output.register_hook(lambda grad: self.backward())
        return output


def train(name, patcher, steps=2, checkpoint=True, between=None, inside=None, backward=None):
    """Train for ``steps``; what is given is called between steps, inside one and during backward. → adapters."""
    with torch.inference_mode(False):  # adapters and data are ordinary tensors
        adapters, examples = adapters_for(patcher, seed=9), Examples(name)
    with borrow(patcher, adapters, checkpoint=checkpoint) as loan:
        denoiser = Disturbed(loan)
        denoiser.inside, denoiser.backward = inside or denoiser.inside, backward or denoiser.backward
        plan = Plan(learning_rate=1e-2, optimizer=OptimizerSettings(gradient_accumulation=2))
        trainer = Trainer(learners(adapters, plan), denoiser, examples, plan, total_steps=steps)
        while not trainer.finished:
            trainer.step()
            if between:
                between()
    return adapters


def raising(error, after=0):
    """A function that raises at its call number ``after``."""
    calls = iter(range(after))

    def fail(*args, **kwargs):
        if next(calls, None) is None:
            raise error
        return calls

    return fail


def failing(monkeypatch, owner, name, error, after):
    """Let ``owner.name`` work ``after`` times, then raise."""
    original, fail = getattr(owner, name), raising(error, after)

    def now_and_then(*args, **kwargs):
        fail()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, now_and_then)


class Boom(RuntimeError):
    pass


def interrupt():
    management.interrupt_current_processing(True)


ENDINGS = {
    "finishes": (None, lambda patch: {}),
    "RuntimeError between steps": (Boom, lambda patch: {"between": raising(Boom())}),
    "RuntimeError in a step": (Boom, lambda patch: {"inside": raising(Boom(), 1)}),
    "cancelled between steps": (management.InterruptProcessingException, lambda patch: {"between": interrupt}),
    "cancelled in recomputation": (management.InterruptProcessingException, lambda patch: {"inside": interrupt}),
    "KeyboardInterrupt": (KeyboardInterrupt, lambda patch: {"between": raising(KeyboardInterrupt())}),
    "out of memory at load": (
        OutOfMemory,
        lambda patch: failing(patch, management, "load_models_gpu", OutOfMemory("load"), 0) or {},
    ),
    "out of memory in forward": (
        OutOfMemory,
        lambda patch: failing(patch, lora_kernel, "convolve", OutOfMemory("forward"), 30) or {},
    ),
    "out of memory in backward": (
        OutOfMemory,
        lambda patch: failing(patch, lora_kernel, "conv_gradients", OutOfMemory("backward"), 7) or {},
    ),
    "out of memory in the optimizer": (
        OutOfMemory,
        lambda patch: failing(patch, torch.optim.AdamW, "step", OutOfMemory("step"), 1) or {},
    ),
}


@pytest.mark.parametrize("patched", (False, True), ids=("base", "with LoRA"))
@pytest.mark.parametrize("ending", ENDINGS)
def test_after_every_ending_the_host_finds_what_it_had(ending, patched):
    error, prepare = ENDINGS[ending]
    patcher = model("sd15", patched)
    with torch.inference_mode():
        management.load_models_gpu([patcher])
        before = Snapshot(patcher)
        with pytest.MonkeyPatch.context() as patch:
            disturbances = prepare(patch)
            if error is None:
                train("sd15", patcher)
            else:
                with pytest.raises(error):
                    train("sd15", patcher, steps=3, **disturbances)
        assert not before.differences(Snapshot(patcher))
    assert_like_new("sd15", patched, patcher)


@pytest.mark.parametrize("checkpoint", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("name", ("sdxl", "sd3", "flux", "hunyuan_video"))
def test_other_families_come_back_as_they_were(name, checkpoint):
    patcher = model(name, False)
    with torch.inference_mode():
        management.load_models_gpu([patcher])
        before = Snapshot(patcher)
        train(name, patcher, steps=1, checkpoint=checkpoint)
        with pytest.raises(Boom):
            train(name, patcher, steps=2, checkpoint=checkpoint, inside=raising(Boom(), 1))
        assert not before.differences(Snapshot(patcher))


def test_a_model_that_was_never_loaded_keeps_its_objects_and_bits():
    patcher = model("sd15", False)
    objects = {name: (tensor, tensor.requires_grad) for name, tensor in patcher.model.named_parameters()}
    before = weights(patcher)
    train("sd15", patcher)
    assert weights(patcher) == before
    for name, tensor in patcher.model.named_parameters():
        assert tensor is objects[name][0] and tensor.requires_grad == objects[name][1], name
    assert_like_new("sd15", False, patcher)


# -- what the host may do in the middle of it


def base_of(patcher):
    """The MODEL before its LoRA was applied."""
    return patcher.parent if patcher.patches else patcher.clone()


EVENTS = {
    "unload_all_models": lambda patcher: management.unload_all_models(),
    "partial unload": lambda patcher: patcher.partially_unload(patcher.offload_device, 1e30),
    "preview of the model on loan": lambda patcher: sample("sd15", patcher),
    "preview with another LoRA": lambda patcher: sample("sd15", core_lora(patcher, 21)),
    "preview of the base": lambda patcher: sample("sd15", base_of(patcher)),
}


# other weights than the loan's lie in the model afterwards: event, whether the model on loan had a LoRA
EXCHANGED = {
    ("unload_all_models", True),
    ("preview with another LoRA", False),
    ("preview with another LoRA", True),
    ("preview of the base", True),
}


@functools.cache
def undisturbed(patched):
    """The adapters of a training that nobody disturbed."""
    return train("sd15", model("sd15", patched), checkpoint=False)


def pictures_wanted(event, patched):
    """What a preview must look like: as if nothing had been lent."""
    return {
        "preview of the model on loan": lambda: expected("sd15", patched)[0],
        "preview with another LoRA": lambda: expected("sd15", patched)[1],
        "preview of the base": lambda: expected("sd15", False)[0],
    }.get(event, lambda: None)()


@pytest.mark.parametrize(
    ("place", "patched"),
    (("between", False), ("between", True), ("inside", False), ("backward", True)),
    ids=("between steps", "between steps with LoRA", "before backward", "in backward with LoRA"),
)
@pytest.mark.parametrize("event", EVENTS)
def test_the_host_may_do_as_it_likes_during_a_loan(event, place, patched):
    """Between steps training goes on as if nothing had been; inside a step it may stop, but never goes wrong."""
    patcher = model("sd15", patched)
    pictures = []

    @torch.inference_mode()  # as all of the host's own work; without it newer hosts replace weights by copies
    def happening():
        pictures.append(EVENTS[event](patcher))

    disturbance = {place: happening}
    with torch.inference_mode():
        sample("sd15", patcher)
        if place != "between" and (event, patched) in EXCHANGED:
            with pytest.raises(WeightsChangedError, match="previews between steps"):
                train("sd15", patcher, checkpoint=False, **disturbance)
        else:
            adapters = train("sd15", patcher, checkpoint=False, **disturbance)
            assert_same_adapters(adapters, undisturbed(patched))
        kept = [*patcher.model.diffusion_model.parameters(), *(entry.weight for entry in patcher.backup.values())]
        assert all(tensor.is_inference() for tensor in kept), "an alias stayed behind"
    wanted = pictures_wanted(event, patched)
    assert pictures and (wanted is None or all(torch.equal(picture, wanted) for picture in pictures))
    assert not [path for path, module in patcher.model.named_modules() if "forward" in vars(module)]
    assert_like_new("sd15", patched, patcher)


def assert_same_adapters(got, want):
    """Up to rounding: partly unloaded layers add the same numbers in another order, and AdamW divides by them."""
    for path, adapter in got.items():
        for name, tensor, other in zip(("down", "up"), adapter.parameters(), want[path].parameters(), strict=True):
            error = (tensor - other).norm() / other.norm()
            assert error < 1e-4, f"{path} {name}: {error}"


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_inside_a_checkpointed_step_leaves_no_trace_in_the_host(event):
    patcher = model("sd15", True)
    with torch.inference_mode():
        sample("sd15", patcher)
        try:
            train("sd15", patcher, inside=lambda: EVENTS[event](patcher))
        except (WeightsChangedError, torch.utils.checkpoint.CheckpointError):
            pass  # the step is lost, loudly
    assert_like_new("sd15", True, patcher)


# -- how tensors may lie in memory


def test_ties_views_and_strides_survive():
    patcher = model("sd15", False)
    network = patcher.model.diffusion_model
    first, second = network.time_embed[2], network.input_blocks[1][0].emb_layers[1]
    transposed = network.middle_block[1].transformer_blocks[0].attn1
    with torch.inference_mode():
        store = torch.zeros(4096 + second.weight.numel())
        view = store[1024 : 1024 + second.weight.numel()].view_as(second.weight).copy_(second.weight)
        second.weight = torch.nn.Parameter(view, requires_grad=False)
        transposed.to_q.weight = torch.nn.Parameter(transposed.to_q.weight.T.contiguous().T, requires_grad=False)
        transposed.to_k.weight = transposed.to_v.weight
        first.bias = network.time_embed[0].bias
        sample("sd15", patcher)
        before = Snapshot(patcher)
        assert second.weight.storage_offset() == 1024 and not transposed.to_q.weight.is_contiguous()
        with borrow(patcher) as loan:
            lent = loan.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1
            assert lent.to_k.weight is lent.to_v.weight and not lent.to_k.weight.is_inference()
            assert network.time_embed[2].bias is network.time_embed[0].bias
            assert second.weight.storage_offset() == 1024 and second.weight.data_ptr() == view.data_ptr()
            assert lent.to_q.weight.stride() == (1, lent.to_q.weight.shape[0])
        adapters = train("sd15", patcher)
        assert all(tensor.isfinite().all() for adapter in adapters.values() for tensor in adapter.parameters())
        assert not before.differences(Snapshot(patcher))
    assert torch.equal(sample("sd15", patcher), sample("sd15", patcher))


def test_a_move_by_the_host_during_a_loan_is_followed():
    """``module.to`` rewrites ``.data`` of the tensors it finds; here dtypes stand in for devices."""
    patcher, moved = model("sd15", False), model("sd15", False)
    with torch.inference_mode():
        for one in (patcher, moved):
            management.load_models_gpu([one])
        objects = {name: id(tensor) for name, tensor in patcher.model.named_parameters()}
        with borrow(patcher) as loan:
            loan.model.diffusion_model.to(torch.bfloat16)
        moved.model.diffusion_model.to(torch.bfloat16)
        assert weights(patcher) == weights(moved)
        assert {name: id(tensor) for name, tensor in patcher.model.named_parameters()} == objects
        with borrow(patcher) as loan, torch.inference_mode():
            loan.model.diffusion_model.to(torch.float32)
        moved.model.diffusion_model.to(torch.float32)
        assert weights(patcher) == weights(moved)
    for got, want in zip(lifecycle("sd15", patcher), lifecycle("sd15", moved), strict=True):
        assert torch.equal(got, want)


def test_borrowing_a_loaded_base_while_its_lora_is_loaded_lends_the_base():
    """Under inference mode or not, the host must be able to take the LoRA off before the loan begins."""
    for outside in (False, True):
        patcher = model("sd15", False)
        plain, places = weights(patcher), {parameter.data_ptr() for parameter in patcher.model.parameters()}
        sample("sd15", core_lora(patcher, 21))
        assert weights(patcher) != plain
        with torch.inference_mode(not outside), borrow(patcher) as loan:
            assert weights(loan.patcher) == plain
            copied = {parameter.data_ptr() for parameter in patcher.model.parameters()} - places
            assert not copied, "weights have been copied"
        assert_like_new("sd15", False, patcher)


def test_an_unknown_path_is_named_and_nothing_is_left_behind():
    patcher = model("sd15", False)
    management.load_models_gpu([patcher])
    before = Snapshot(patcher)
    adapters = {"diffusion_model.nowhere": next(iter(adapters_for(patcher).values()))}
    with pytest.raises(KeyError, match="nowhere"), borrow(patcher, adapters):
        pass
    assert not before.differences(Snapshot(patcher))
