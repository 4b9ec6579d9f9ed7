"""What an optimizer remembers survives safetensors and JSON to the last bit, for every row of the table."""

import json

import pytest
import safetensors.torch
import torch

from lora_loom.training.optimizers import OPTIMIZERS, make_optimizer
from lora_loom.training.optimizers.masters import Masters
from lora_loom.training.optimizers.state import pack, unpack
from lora_loom.training.options import OptionError
from lora_loom.training.settings import OptimizerSettings

SHAPES = ((64, 80), (65, 67), (7, 3), (6, 4, 3, 3), (5,), (1, 1, 2))  # 8-bit states begin at 4096 numbers
NAMES = ("AdEMAMix", "SOAP", "StableAdamW", "MADGRAD", "AggMo", "Shampoo")  # of pytorch_optimizer
CASES = [*(name for name in OPTIMIZERS if name != "pytorch_optimizer"), *NAMES]

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers")


class Run:
    """Two groups of tensors, trained as the loop does it; ``half`` keeps them in bfloat16."""

    def __init__(self, name, tensors, half=False, **options):
        self.tensors, self.step, self.half = [tensor.clone() for tensor in tensors], 0, half
        self.masters = Masters(self.tensors)
        own = {"optimizer": "pytorch_optimizer", "optimizer_name": name} if name in NAMES else {"optimizer": name}
        row = OPTIMIZERS[own["optimizer"]]
        if row.finds_rate:  # it begins too low to round to anything
            own["optimizer_args"] = "d0=0.01"
        self.settings = OptimizerSettings(**own | options)
        self.rates = (1.0, 1.0) if row.one_rate else (1.0, 0.25) if row.finds_rate else (0.01, 0.002)
        masters = self.masters.of(self.tensors)
        parts = [(masters[place::2], rate) for place, rate in enumerate(self.rates)]
        groups = [{"params": part, "lr": rate} for part, rate in parts if part]
        with self.masters.gathered():
            self.optimizer = make_optimizer(self.settings, groups)

    def train(self, steps):
        for _ in range(steps):
            draws = torch.Generator().manual_seed(100 + self.step)
            for tensor in self.tensors:
                tensor.grad = (0.1 * torch.randn(tensor.shape, generator=draws)).to(tensor.dtype)
            self.tensors[-1].grad = self.tensors[-1].grad if self.step < 2 else None  # it has stopped learning
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=False):
                group["lr"] = rate * (1 - self.step / 20)
            with self.masters.gathered():
                self.optimizer.step()
                self.masters.write_back(lambda draws=draws: draws)
            self.step += 1
        return self

    def look(self):
        """Measure as the loop does: averaged weights for a moment, then the old ones to the bit."""
        if hasattr(self.optimizer, "eval"):
            kept = [tensor.clone() for tensor in self.tensors]
            with self.masters.gathered():
                self.optimizer.eval()
            with self.masters.gathered():
                self.optimizer.train()
            for tensor, old in zip(self.tensors, kept, strict=True):
                tensor.copy_(old)

    def resumed(self, name, **options):
        """Another run that knows nothing but what was written."""
        tensors, facts = pack(self.optimizer)
        written = {key: value.to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        weights = [tensor.clone() for tensor in self.tensors]
        read, facts = safetensors.torch.load(safetensors.torch.save(written)), json.loads(json.dumps(facts))
        other = Run(name, weights, self.half, **options)
        with other.masters.gathered():
            unpack(other.optimizer, read, facts)
        other.step = self.step
        return other


def start(dtype=torch.float32):
    draws = torch.Generator().manual_seed(5)
    tensors = [torch.randn(shape, generator=draws).to(dtype) for shape in SHAPES]
    tensors[2].zero_()  # as the second factor of a LoRA begins
    return tensors


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize("half", (False, True), ids=("fp32", "bf16"))
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(name, half):
    whole = Run(name, start(torch.bfloat16 if half else torch.float32), half).train(3)
    resumed = whole.resumed(name)
    assert same(whole, resumed)
    whole.train(2)
    resumed.train(2)
    again = resumed.resumed(name)  # a second time, after the weights were looked at
    again.look()
    whole.train(3)
    again.train(3)
    assert same(whole, again)
    assert not same(whole, Run(name, start(whole.tensors[0].dtype), half).train(5))


@pytest.mark.parametrize("name", CASES)
def test_the_state_matters(name):
    """So that the test above could fail."""
    whole = Run(name, start()).train(6)
    forgetful = Run(name, whole.tensors)
    forgetful.step = whole.step
    whole.train(3)
    forgetful.train(3)
    assert same(whole, forgetful) == (name == "SGD")  # without momentum it remembers nothing


@pytest.mark.parametrize("name", CASES)
def test_the_state_is_as_large_as_the_table_says(name):
    if name in NAMES:
        return
    draws = torch.Generator().manual_seed(1)
    tensors = [torch.randn(256, 320, generator=draws)]
    run = Run(name, tensors)
    for _ in range(2):
        run.tensors[0].grad = torch.randn(256, 320, generator=draws)
        run.optimizer.step()
    found = sum(tensor.nbytes for tensor in pack(run.optimizer)[0].values()) / tensors[0].numel()
    assert found == pytest.approx(OPTIMIZERS[name].state_bytes, abs=0.25)


def test_moments_of_bfloat16_parameters_are_not_rounded():
    """torch's own load_state_dict casts them to the dtype of the parameters."""
    tensors = [torch.zeros(3, 3, dtype=torch.bfloat16)]
    one, other = (torch.optim.SGD(tensors, 0.1, momentum=0.9) for _ in range(2))
    exact = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    one.state[tensors[0]] = {"momentum_buffer": exact, "count": 3, "seen": (True, None, 0.1, float("inf"))}
    unpack(other, *pack(one))
    found = other.state[tensors[0]]
    assert torch.equal(found["momentum_buffer"], exact) and found["momentum_buffer"] is not exact
    assert {key: value for key, value in found.items() if key != "momentum_buffer"} == {
        "count": 3,
        "seen": (True, None, 0.1, float("inf")),
    }


def test_the_order_in_memory_is_kept():
    """Sums over a transposed tensor add in another order."""
    tensors = [torch.zeros(7, 5)]
    one, other = (torch.optim.SGD(tensors, 0.1, momentum=0.9) for _ in range(2))
    one.state[tensors[0]] = {"momentum_buffer": torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).t()}
    saved, facts = pack(one)
    unpack(other, {name: value.contiguous() for name, value in saved.items()}, facts)
    before, after = (optimizer.state[tensors[0]]["momentum_buffer"] for optimizer in (one, other))
    assert torch.equal(before, after) and before.stride() == after.stride() == (1, 7)


def test_tensors_that_are_one_stay_one():
    """bitsandbytes' tables are shared by all parameters; saving each would cost more than the 8 bits save."""
    run = Run("AdamW8bit", start()).train(2)
    tables = [name for name in pack(run.optimizer)[0] if "qmap" in name]
    assert len(tables) == 2
    states = [state for state in run.resumed("AdamW8bit").optimizer.state.values() if "qmap1" in state]
    assert len(states) == 2 and states[0]["qmap1"] is states[1]["qmap1"]


def test_settings_of_the_run_that_goes_on_hold():
    """A changed decay, beta or d_coef is not overruled by the old one; what was learned of the rate is kept."""
    before = Run("Prodigy", start(), optimizer_args="")
    for _ in range(9):
        for tensor in before.tensors:
            tensor.grad = torch.ones_like(tensor)
        before.optimizer.step()
    after = before.resumed("Prodigy", weight_decay=0.25, beta1=0.5, optimizer_args="d_coef=3").optimizer
    old, new = before.optimizer.param_groups[0], after.param_groups[0]
    assert (new["weight_decay"], new["betas"], new["d_coef"]) == (0.25, (0.5, 0.999), 3)
    assert old["d"] == new["d"] > 2e-6 and old["k"] == new["k"] == 9


def test_a_state_of_other_tensors_is_refused():
    tensors, facts = pack(Run("AdamW", start()).train(1).optimizer)
    with pytest.raises(ValueError, match="belongs to another"):
        unpack(torch.optim.AdamW(start()[:2]), tensors, facts)


def test_what_has_no_plain_form_is_named():
    optimizer = torch.optim.SGD([torch.zeros(2)], 0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {"preconditioner": object()}
    with pytest.raises(OptionError, match="^optimizer is 'SGD', expected .*0.preconditioner is a object"):
        pack(optimizer)
