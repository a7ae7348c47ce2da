"""The optimizer phase of a training loop: torch's calls around stock's step, and ours in one pass.

Both read grads that are the same tensors, filled anew before each step: a phase leaves zeros there, and
with zeros, states would decay into denormal numbers, whose arithmetic is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fused_optim
from fused_optim import FusedOptimizer
from fused_optim.bench import agreement, contestants, timing
from fused_optim.bench.agreement import Disagreement, expect_near
from fused_optim.bench.contestants import OURS, STOCK_CALLS, Choice, Entrants
from fused_optim.bench.peers import Peer
from fused_optim.bench.timing import Step
from fused_optim.bench.workloads import Phase, Workload

_torch: Any = torch  # whose functions on lists of tensors have no public types
# GradScaler's first one. Grads come multiplied by it where a phase unscales.
SCALE = 65536.0
# Far below the norm: 6,400 for GPT-2's numel of grads uniform in (-1, 1).
MAX_GRAD_NORM = 1.0
# The work is that of any other; a wrong one would show in the few steps that are compared.
EMA_DECAY = 0.99

# To find out which variant of a call is the fastest, a few rounds are enough.
CHOICE = timing.Schedule(
    budget_s=0.2, limit_s=2, min_rounds=3, max_rounds=20, n_passes=1, n_screening_rounds=1
)
# Memory, in params, grads and two states: ours, stock's, what the choice is made with, and averages.
N_SETS_OF_STREAMS = 4
# Steps that are compared. The first average is a copy, the second one moves.
N_COMPARED = 3
# Relative. On a CPU torch sums squares in float32, of 39 M elements of GPT-2's embedding in few runs:
# the norm of the shortened GPT-2 is 1.3e-3 too small (measured against float64).
NORM_TOLERANCE = 2e-3


class StockCalls:
    """The calls of torch that are a phase, in all their variants, around an optimizer's step.

    Attributes:
        optimizer: torch.optim's or a peer's.
        emas: averages, one for each param.
        norm: what the latest clipping found.
    """

    def __init__(self, optimizer: Optimizer, params: Sequence[nn.Parameter]) -> None:
        self.params = list(params)
        self.optimizer = optimizer
        self.emas = [param.detach().clone() for param in params]
        self.norm = torch.zeros(())

    def variants(self) -> dict[str, dict[str, Step]]:
        """Part -> variant -> call; of the step there is one, the optimizer's."""
        grads = [param.grad for param in self.params]
        device = self.params[0].device
        inverse_scale = torch.full((), 1 / SCALE, device=device)
        found_inf = torch.zeros((), device=device)
        return {
            "unscale": {
                "_amp_foreach_non_finite_check_and_unscale_": lambda: (
                    _torch._amp_foreach_non_finite_check_and_unscale_(
                        grads, found_inf, inverse_scale
                    )
                ),
                "_foreach_mul_": lambda: _torch._foreach_mul_(grads, inverse_scale),
            },
            "clip": {
                f"clip_grad_norm_(foreach={foreach})": lambda f=foreach: self._clip(f)
                for foreach in (True, False)
            },
            "EMA": {"_foreach_lerp_": self._lerp_together, "lerp_": self._lerp_each},
            "zero": {
                "zero_grad(set_to_none=False)": lambda: self.optimizer.zero_grad(set_to_none=False),
                "_foreach_zero_": lambda: _torch._foreach_zero_(grads),
            },
        }

    def _clip(self, foreach: bool) -> None:
        self.norm = nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM, foreach=foreach)

    @torch.no_grad()
    def _lerp_together(self) -> None:
        _torch._foreach_lerp_(self.emas, self.params, 1 - EMA_DECAY)

    @torch.no_grad()
    def _lerp_each(self) -> None:
        for ema, param in zip(self.emas, self.params, strict=True):
            ema.lerp_(param, 1 - EMA_DECAY)

    def phase(self, phase: Phase, choices: dict[str, Choice]) -> Step:
        """The chosen calls one after the other."""
        variants = self.variants()
        calls = {
            part: self.optimizer.step if part == "step" else variants[part][choices[part].variant]
            for part in phase.parts
        }
        if phase.scaler is None:
            return _in_turn(list(calls.values()))
        scaler = _scaler(torch.amp.GradScaler, self.params[0].device)
        calls["unscale"] = lambda: scaler.unscale_(self.optimizer)
        calls["step"] = lambda: scaler.step(self.optimizer)
        return _in_turn([*calls.values(), scaler.update])


def _in_turn(calls: list[Step]) -> Step:
    def step() -> None:
        for call in calls:
            call()

    return step


def _scaler(cls: type[torch.amp.GradScaler], device: torch.device) -> torch.amp.GradScaler:
    """One whose scale stays what the grads were multiplied by."""
    scaler = cls(device.type, init_scale=SCALE, growth_interval=2**30)
    scaler.scale(torch.zeros((), device=device))  # makes the scale
    return scaler


def enter(
    workload: Workload,
    params: list[nn.Parameter],
    peers: Sequence[Peer],
    *,
    quick: bool,
    timer: timing.Timer | None,
) -> Entrants:
    """Choose stock's calls, build both phases and compare a few steps of them.

    Args:
        params: with grads; they become ours.
        peers: whose steps are timed among the same calls of torch.
        timer: for the choice; None: the host's.

    Raises:
        Disagreement: params, averages or norms differ by more than rounding.
    """
    phase = workload.phase
    assert phase is not None
    grads = [param.grad for param in params if param.grad is not None]
    source = [grad * SCALE if "unscale" in phase.parts else grad.clone() for grad in grads]

    def fill() -> None:
        _torch._foreach_copy_(grads, source)

    choices = _choose(workload, _share_grads(params), quick=quick, before=fill, timer=timer)
    copies = _share_grads(params)
    stock = StockCalls(contestants.stock(workload, copies, choices["step"].variant), copies)
    stock_step = stock.phase(phase, choices)
    ours = contestants.ours(workload, params, one_pass_options(phase))
    our_step = _our_step(ours, phase, params[0].device)
    for done in range(N_COMPARED):
        for name, step in ((STOCK_CALLS, stock_step), (OURS, our_step)):
            fill()
            step()
            if "zero" in phase.parts and any(grad.any() for grad in grads):
                raise Disagreement(f"{name} leaves grads that are not zero")
        if done == 0:
            _torch._foreach_copy_(stock.emas, stock.params)
    _compare(stock, ours, phase)
    steps = {OURS: our_step, STOCK_CALLS: stock_step}
    not_measured: dict[str, str] = {}
    for peer in peers:
        with contestants.reported(peer.name, not_measured):
            copies = _share_grads(params)
            fill()
            step = StockCalls(peer.build(workload, copies), copies).phase(phase, choices)
            step()
            steps[peer.name] = step
    nbytes, n_streams = contestants.bytes_per_step(ours)
    return Entrants(
        ours=ours,
        steps=steps,
        baselines=[STOCK_CALLS],
        nbytes=nbytes + _bytes_around(ours, grads),
        n_streams=n_streams,
        not_measured=not_measured,
        before=fill,
        stock_calls=choices,
    )


def _share_grads(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Params of equal values with the very same grads."""
    copies = []
    for param in params:
        copies.append(nn.Parameter(param.detach().clone()))
        copies[-1].grad = param.grad
    return copies


def one_pass_options(phase: Phase) -> fused_optim.OnePassOptions:
    """The options with which our step does these parts."""
    options = fused_optim.OnePassOptions()
    if "clip" in phase.parts:
        options["max_grad_norm"] = MAX_GRAD_NORM
    if "EMA" in phase.parts:
        options["ema_decay"] = EMA_DECAY
    if "zero" in phase.parts:
        options["zero_grads"] = True
    return options


def _our_step(ours: FusedOptimizer, phase: Phase, device: torch.device) -> Step:
    if phase.scaler is None:
        if "unscale" in phase.parts:
            # As GradScaler does; pyright knows no such attribute.
            ours.grad_scale = torch.full((), SCALE, device=device)  # pyright: ignore
        return ours.step
    classes = {"torch.amp": torch.amp.GradScaler, "fused_optim": fused_optim.GradScaler}
    scaler = _scaler(classes[phase.scaler], device)
    return _in_turn([lambda: scaler.step(ours), scaler.update])


def _choose(
    workload: Workload,
    params: Sequence[nn.Parameter],
    *,
    quick: bool,
    before: Step,
    timer: timing.Timer | None,
) -> dict[str, Choice]:
    """Time every variant of each of stock's calls by itself; the params change meanwhile."""
    phase = workload.phase
    assert phase is not None

    def drop(medians: dict[str, float]) -> set[str]:
        return timing.clearly_slower(medians, min(medians.values()))

    def fastest(steps: dict[str, Step]) -> Choice:
        samples = timing.alternate(steps, CHOICE, before=before, drop=drop, timer=timer)
        seconds = {
            name: timing.quartiles(timing.round_times(rounds)).median
            for name, rounds in samples.items()
        }
        return Choice(min(seconds, key=lambda name: seconds[name]), seconds)

    names, _ = contestants.stock_variants(workload, quick=quick)
    if "fused" in names:
        names = [name for name in names if name != "for-loop"]  # never the fastest then
    optimizers = {name: contestants.stock(workload, params, name) for name in names}
    choices = {"step": fastest({name: opt.step for name, opt in optimizers.items()})}
    optimizer = optimizers[choices["step"].variant]
    del optimizers  # and the others' states
    calls = StockCalls(optimizer, params).variants()
    if phase.scaler is not None:
        del calls["unscale"]["_foreach_mul_"]  # the other one is what unscale_() calls
    return {
        part: choices[part] if part in choices else fastest(calls[part]) for part in phase.parts
    }


def _compare(stock: StockCalls, ours: FusedOptimizer, phase: Phase) -> None:
    """Raise Disagreement unless both did the same to params, states, averages and norms."""
    [group] = ours.param_groups
    # Norms that are apart scale the grads differently, and with them the states. AdamW's update hardly
    # heeds that: grad / (|grad| + eps) moves by a quarter of it at most.
    size_bound = N_COMPARED * (agreement.ROUNDING + group["lr"] * NORM_TOLERANCE / 4)
    for i, (theirs, own) in enumerate(zip(stock.params, group["params"], strict=True)):
        expect_near(f"param {i}", theirs, own, size_bound)
        for name, state in stock.optimizer.state[theirs].items():
            if state.dim():
                bound = 3 * NORM_TOLERANCE * state.abs().max().item()
                expect_near(f"{name} {i}", state, ours.state[own][name], bound)
    if "EMA" in phase.parts:
        for i, (theirs, own) in enumerate(zip(stock.emas, ours.ema_params(), strict=True)):
            expect_near(f"average {i}", theirs, own, size_bound)
    if "clip" in phase.parts:
        assert ours.grad_norm is not None
        norm, own_norm = float(stock.norm), float(ours.grad_norm)
        if not abs(norm - own_norm) <= NORM_TOLERANCE * own_norm:
            raise Disagreement(f"the norm is {norm:.6g}, ours {own_norm:.6g}")
        if not own_norm > 2 * MAX_GRAD_NORM:
            raise Disagreement(f"a norm of {own_norm:.3g} leaves nothing to clip")


def _bytes_around(ours: FusedOptimizer, grads: Sequence[Tensor]) -> int:
    """Bytes that our phase reads and writes beside those of the step."""
    grad_nbytes = sum(grad.nbytes for grad in grads)
    measured = grad_nbytes if ours.max_grad_norm is not None else 0
    zeroed = grad_nbytes if ours.zero_grads else 0
    has_ema = ours.param_groups[0].get("ema_decay") is not None
    return measured + zeroed + (2 * sum(e.nbytes for e in ours.ema_params()) if has_ema else 0)
