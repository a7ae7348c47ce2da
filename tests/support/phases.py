"""The optimizer phase of a training loop, in stock's calls and in our one pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from support.cases import Case
from support.twins import SHAPES, Run, assert_close, assert_same_run


@dataclass(frozen=True)
class Phase:
    """Options of OnePassOptions; what they mean in stock's calls is written down in PhaseRun."""

    options: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return self.options.get(name)

    @property
    def id(self) -> str:
        parts = [
            key if value is True else f"{key}={str(value).removeprefix('torch.')}"
            for key, value in self.options.items()
        ]
        return "-".join(parts) or "off"


class PhaseRun(Run):
    """A Run whose steps are whole phases: one call for ours, one after the other for stock.

    `shadows` are stock's averages: param -> [ema, n_averaged].
    """

    def __init__(self, case: Case, build: Callable[..., Optimizer], phase: Phase, **kwargs: Any):
        self.phase = phase
        self.shadows: dict[Tensor, list] = {}
        self.skipped: set[int] = set()  # numbers of steps
        self.norm = 0.0
        super().__init__(case, build, **kwargs)

    def make(self, params: Any, **extra: Any) -> Optimizer:
        return super().make(params, **(self.phase.options if self.is_ours else {}), **extra)

    def step_as_is(self) -> None:
        self.n_steps += 1
        if self.is_ours:
            self.opt.step()
        else:
            self._stock_phase()

    def all_params(self) -> list[Tensor]:
        return [param for group in self.opt.param_groups for param in group["params"]]

    @torch.no_grad()
    def _stock_phase(self) -> None:
        params = [param for param in self.all_params() if param.grad is not None]
        bad = any(not param.grad.isfinite().all() for param in params)
        if bad and self.phase.skip_nonfinite:
            self.skipped.add(self.n_steps)
        else:
            whole = [param.grad for param in params]
            if self.phase.max_grad_norm is not None:
                for param in params:  # stock cannot write expanded grads
                    if not self.phase.write_clipped_grads or 0 in param.grad.stride():
                        param.grad = param.grad.clone()
                self.norm = torch.nn.utils.clip_grad_norm_(
                    params, self.phase.max_grad_norm, foreach=False
                ).item()
            self.opt.step()
            for param, grad in zip(params, whole):
                if not self.phase.write_clipped_grads or torch.equal(param.grad, grad):
                    param.grad = grad
            self._average()
        if self.phase.zero_grads:
            self.opt.zero_grad(set_to_none=False)

    def _average(self) -> None:
        there = {id(param) for param in self.all_params()}
        self.shadows = {param: s for param, s in self.shadows.items() if id(param) in there}
        for group in self.opt.param_groups:
            decay = group.get("ema_decay", self.phase.ema_decay)
            for param in group["params"] if decay is not None else ():
                shadow = self.shadows.get(param)
                if shadow is None or shadow[0].shape != param.shape:
                    average = param.detach().clone().to(self._dtype_of_average(param))
                    shadow = self.shadows[param] = [average, 0]
                average, n_averaged = shadow
                if n_averaged == 0:
                    average.copy_(param)
                else:
                    if self.phase.ema_warmup:
                        decay = min(self.phase.ema_decay, (1 + n_averaged) / (10 + n_averaged))
                    average.lerp_(param.detach().to(average.dtype), 1 - decay)
                shadow[1] += 1

    def _dtype_of_average(self, param: Tensor) -> torch.dtype:
        coarse = param.dtype in (torch.bfloat16, torch.float16)
        return self.phase.ema_dtype if coarse and self.phase.ema_dtype else param.dtype

    def averages(self) -> list[Tensor]:
        """In the order of the params that have one."""
        if self.is_ours:
            return self.opt.ema_params()
        return [
            self.shadows[param][0] if param in self.shadows else param.detach()
            for group in self.opt.param_groups
            if group.get("ema_decay", self.phase.ema_decay) is not None
            for param in group["params"]
        ]

    def saved(self) -> dict[str, Any]:
        """What a checkpoint holds: ours in state_dict(), stock's averages beside it."""
        saved = {"optimizer": self.opt.state_dict()}
        if not self.is_ours:
            saved["shadows"] = [self.shadows.get(param) for param in self.all_params()]
        return copy.deepcopy(saved)

    def load(self, saved: dict[str, Any]) -> None:
        self.opt.load_state_dict(saved["optimizer"])
        if not self.is_ours:
            pairs = zip(self.all_params(), saved["shadows"])
            self.shadows = {
                param: [shadow[0].to(self._dtype_of_average(param)), shadow[1]]
                for param, shadow in pairs
                if shadow is not None
            }


def run_phases(
    case: Case,
    phase: Phase,
    program: Callable[[PhaseRun], object],
    shapes: Sequence = SHAPES,
    dtype: torch.dtype = torch.float32,
    **extra: object,
) -> tuple[PhaseRun, PhaseRun]:
    """Ours and stock after `program`: the same params, states, grads and averages, or the same error."""
    runs = []
    for build in (case.fused, case.stock):
        run = PhaseRun(case, build, phase, shapes=shapes, dtype=dtype, extra=extra)
        try:
            program(run)
        except Exception as error:
            run.error = error
        runs.append(run)
    ours, stock = runs
    if stock.error is not None:
        assert type(ours.error) is type(stock.error), (ours.error, stock.error)
        return ours, stock
    if ours.error is not None:
        # A step that stock skips looks at no state; ours refuses bad ones first.
        if ours.n_steps in stock.skipped and ": state '" in str(ours.error):
            return ours, stock
        raise ours.error
    # Stock's norm is of the coarsest dtype among the grads, and reaches all params.
    dtypes = {stock.dtype, *(param.dtype for param in (*stock.params, *stock.all_params()))}
    stock.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    if any(group.get("ema_decay") is not None for group in ours.opt.param_groups):
        _assert_same_averages(ours, stock)
    for group in ours.opt.param_groups:  # ours only
        for key in ("ema_decay", "ema_warmup", "ema_dtype"):
            group.pop(key, None)
    assert_same_run(ours, stock)
    for i, (param, other) in enumerate(zip(ours.params, stock.params)):
        assert (param.grad is None) == (other.grad is None)
        if param.grad is not None:
            # A coefficient of some roundings more, of grads that are the same bits.
            eps = torch.finfo(stock.dtype).eps
            assert_close(param.grad, other.grad, 1, f"grad {i}", eps)
    return ours, stock


def _assert_same_averages(ours: PhaseRun, stock: PhaseRun) -> None:
    averages, others = ours.averages(), stock.averages()
    assert len(averages) == len(others)
    for i, (average, other) in enumerate(zip(averages, others)):
        assert average.dtype == other.dtype
        eps = torch.finfo(stock.dtype).eps
        # In which order they lie in memory is nobody's business.
        pair = average.contiguous(), other.contiguous()
        assert_close(*pair, ours.n_steps, f"average {i}", eps)
