"""The scripts in examples/: each pair computes the same weights, and the demo judges soundly."""

import runpy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import fused_optim
from support.cases import OF_TORCH
from support.marks import needs_cpu_kernels

pytestmark = needs_cpu_kernels

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PAIRS = ["one_sample", "mini_batch"]
N_STEPS = {"one_sample": 1000, "mini_batch": 500}
FLOAT32_EPS = 2.0**-23


@dataclass
class Recording:
    """What one script did: per step its inputs, its weights before and after, its optimizer."""

    namespace: dict = field(default_factory=dict)
    inputs: list = field(default_factory=list)
    weights_before: list = field(default_factory=list)
    weights: list = field(default_factory=list)
    optimizers: list = field(default_factory=list)


def record(script: Path) -> Recording:
    recording = Recording()

    def on_forward(module, args):
        recording.inputs.append(args[0].double().numpy().ravel())
        recording.weights_before.append([param.item() for param in module.parameters()])

    def on_step(optimizer, args, kwargs):
        (group,) = optimizer.param_groups
        recording.weights.append([param.item() for param in group["params"]])
        recording.optimizers.append(optimizer)

    hooks = [
        register_module_forward_pre_hook(on_forward),
        register_optimizer_step_post_hook(on_step),
    ]
    try:
        recording.namespace = runpy.run_path(str(script), run_name="__main__")
    finally:
        for hook in hooks:
            hook.remove()
    return recording


def largest_difference(stock: Recording) -> np.ndarray:
    """How far two correct runs of a script may be apart after each step, shape (n_steps,).

    The scripts fit y = weight * x + bias by SGD on the mean squared error. The gradient is linear
    in p = (weight, bias), so from one step to the next a difference d becomes (I - lr * H) d plus
    what the two runs round differently, with H = 2/n sum((x, 1) (x, 1)^T) of the step's n samples.
    Each rounding is at most eps / 2 of its result, in either run, so eps in all:
    - of each element of p, the rounding of the new value and of lr * grad;
    - of each element of grad, lr times: weight * x, + bias, - y, * 2, / n, * x and n - 1 additions,
      n + 5 in all, of terms at most |x| or 1 times 2 * (|weight * x| + |bias| + |y|) on average.
    """
    lr = stock.optimizers[0].param_groups[0]["lr"]
    y_size = stock.namespace["y"].abs().max().item()
    difference, bounds = 0.0, []
    for x, before, after in zip(stock.inputs, stock.weights_before, stock.weights, strict=True):
        rows = np.stack([x, np.ones_like(x)])
        hessian = 2 / len(x) * rows @ rows.T
        terms = 2 * (np.abs(before[0] * x) + abs(before[1]) + y_size)
        grad_size = np.mean(np.abs(rows) * terms, axis=1)
        rounded = FLOAT32_EPS * (np.abs(after) + lr * (len(x) + 6) * grad_size)
        growth = np.linalg.norm(np.eye(2) - lr * hessian, ord=2)
        difference = growth * difference + np.linalg.norm(rounded)
        bounds.append(difference)
    return np.array(bounds)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_pair_differs_in_the_import_alone(pair):
    stock = (EXAMPLES / f"{pair}_torch.py").read_text().splitlines()
    fused = (EXAMPLES / f"{pair}.py").read_text().splitlines()
    assert len(stock) == len(fused)
    different = [lines for lines in zip(stock, fused, strict=True) if lines[0] != lines[1]]
    assert different == [("from torch.optim import SGD", "from fused_optim import SGD")]


@pytest.mark.parametrize("pair", PAIRS)
def test_the_pair_agrees_after_every_step(pair):
    stock = record(EXAMPLES / f"{pair}_torch.py")
    fused = record(EXAMPLES / f"{pair}.py")
    assert len(stock.weights) == len(fused.weights) == N_STEPS[pair]
    assert all(type(optimizer) is torch.optim.SGD for optimizer in stock.optimizers)
    assert all(type(optimizer) is fused_optim.SGD for optimizer in fused.optimizers)
    assert fused.optimizers[-1].last_step.fallbacks == []

    difference = np.abs(np.array(fused.weights) - np.array(stock.weights)).max(axis=1)
    assert (difference <= largest_difference(stock)).all()


@pytest.mark.parametrize("pair", PAIRS)
def test_a_wrong_learning_rate_leaves_the_pair_s_bound(pair, monkeypatch):
    stock = record(EXAMPLES / f"{pair}_torch.py")

    class WrongSGD(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr * 1.001)

    monkeypatch.setattr(torch.optim, "SGD", WrongSGD)
    wrong = record(EXAMPLES / f"{pair}_torch.py")
    difference = np.abs(np.array(wrong.weights) - np.array(stock.weights)).max(axis=1)
    assert (difference > largest_difference(stock)).any()


@pytest.fixture
def demo(monkeypatch, one_thread):  # as the demo itself does
    """The demo's module; its neighbours are found as when it runs as a script."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    return demo


@pytest.fixture
def short_digits(demo):
    return demo.digits(n_epochs=1)


def adamw(cls=torch.optim.AdamW, **options):
    return lambda params: cls(params, **{"lr": 2e-3, **options})


def test_the_demo_accepts_other_roundings(demo, short_digits):
    def noisy(params):
        optimizer = adamw()(params)
        demo.add_rounding_noise(optimizer, seed=demo.N_TWINS)  # The seed after the twins' own.
        return optimizer

    comparison = demo.compare(short_digits, "AdamW", adamw(), noisy)
    assert comparison.difference.any(), "bitwise equal runs would not try the bound"
    assert (comparison.difference <= comparison.bound).all()


def test_the_demo_accepts_fused_optim(demo, short_digits):
    comparison = demo.compare(short_digits, "AdamW", adamw(), adamw(fused_optim.AdamW))
    assert (comparison.difference <= comparison.bound).all()
    assert comparison.fused.not_fused == {}


@pytest.mark.parametrize("wrong", [{"betas": (0.9, 0.998)}, {"lr": 2.001e-3}, {"eps": 1e-7}])
def test_the_demo_rejects_a_wrong_update(demo, short_digits, wrong):
    comparison = demo.compare(short_digits, "AdamW", adamw(), adamw(**wrong))
    assert any("loss curves differ" in failure for failure in comparison.failures())


def test_the_demo_rejects_a_nan(demo, short_digits):
    comparison = demo.compare(short_digits.first(5), "AdamW", adamw(), adamw())
    assert comparison.difference.max() == 0
    comparison.fused.losses[3] = float("nan")
    assert any("at step 3" in failure for failure in comparison.failures())


def test_the_demo_rejects_a_fallback(demo, short_digits):
    class HalfStock(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            fallback = SimpleNamespace(group=0, index=0, reason="overlapping memory")
            self.last_step = SimpleNamespace(tensors={"cpu": 6, "stock": 1}, fallbacks=[fallback])

    task = short_digits.first(5)
    comparison = demo.compare(task, "AdamW", adamw(), adamw(HalfStock))
    failures = "\n".join(comparison.failures())
    assert "5 tensor steps: overlapping memory" in failures
    assert "5 tensor steps: not counted by last_step" in failures


@pytest.fixture
def phases(demo, short_digits):
    """Compare the phases of AdamW on a short task."""
    import demo_phase

    def compare():
        return demo_phase.compare_phases(short_digits, "AdamW", {"lr": 2e-3}, demo.N_TWINS)

    compare.module = demo_phase
    return compare


def test_the_demo_accepts_a_swap_and_one_pass(phases, capsys):
    comparison = phases()
    assert comparison.failures() == []
    assert list(comparison.runs) == ["stock calls", "plain swap", "one pass"]
    for run in comparison.runs.values():
        assert run.step_seconds > 0
    assert comparison.runs["one pass"].averages_loss != comparison.runs["one pass"].losses[-1]
    comparison.report()
    out = capsys.readouterr().out
    assert all(name in out for name in comparison.runs)


def test_the_demo_s_phase_clips_and_zeroes(phases):
    module = phases.module
    param = torch.nn.Parameter(torch.ones(3))
    makes = (
        module.stock_calls(torch.optim.AdamW, {}),
        module.stock_calls(fused_optim.AdamW, {}, noise_seed=0),
        module.one_pass(fused_optim.AdamW, {}),
    )
    for make_phase in makes:
        phase = make_phase([param])
        param.grad = torch.full((3,), 100.0)
        phase.run()
        assert param.grad.tolist() == [0.0] * 3
        exp_avg = phase.optimizer.state[param]["exp_avg"]
        assert exp_avg.norm().item() == pytest.approx(0.1 * module.MAX_GRAD_NORM, rel=1e-5)
        torch.testing.assert_close(phase.averages(), [param.detach()])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ema_decay": 0.91}, "one pass: losses of the averages differ"),
        ({"max_grad_norm": 1e9}, "one pass: loss curves differ"),
        ({"zero_grads": False}, "one pass: loss curves differ"),
        ({"lr": 2.001e-3}, "one pass: loss curves differ"),
    ],
)
def test_the_demo_rejects_a_wrong_one_pass(phases, monkeypatch, wrong, message):
    right = fused_optim.AdamW

    def build(params, **options):
        return right(params, **{**options, **(wrong if "ema_decay" in options else {})})

    monkeypatch.setattr(fused_optim, "AdamW", build)
    assert any(message in failure for failure in phases().failures())


def test_the_demo_trains_with_every_optimizer(demo):
    trained = [*demo.DIGITS_OPTIMIZERS, *demo.CHARACTERS_OPTIMIZERS]
    assert sorted(trained) == OF_TORCH
