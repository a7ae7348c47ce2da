"""All grads together: their norm, the coefficient that clips them, and whether the step is skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_optim import backends, sharding
from fused_optim.options import check_flags, check_max_grad_norm
from fused_optim.wrappers import unwrapped

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer
    from fused_optim.step import Scaling


class Clipping:
    """The options that concern all grads together, and what the latest step measured.

    Attributes:
        grad_norm: float64, the latest total norm; None before.
        report: GradScaler reads here, after the step under way, if some grad was not finite.
        n_skipped: number of steps that the host has skipped.
        n_skipped_on_device: int64, number that a device has skipped; None: none.
    """

    def __init__(self) -> None:
        self._max_grad_norm: float | None = None
        self.write_clipped_grads = False
        self.skip_nonfinite = False
        self.zero_grads = False
        self.grad_norm: Tensor | None = None
        self.report: Tensor | None = None
        self.n_skipped = 0
        self.n_skipped_on_device: Tensor | None = None

    @property
    def max_grad_norm(self) -> float | None:
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._max_grad_norm = check_max_grad_norm(value)

    @property
    def skips(self) -> bool:
        """True if a grad that is not finite skips the step under way."""
        return self.skip_nonfinite or self.report is not None

    @property
    def skipped_steps(self) -> Tensor:
        if self.n_skipped_on_device is None:
            return torch.tensor(self.n_skipped, device="cpu")
        return self.n_skipped_on_device + self.n_skipped

    def coefficient(self, norm: float) -> float:
        """As torch.nn.utils.clip_grad_norm_ has it, NaN for a NaN; an infinite limit never clips."""
        if self._max_grad_norm is None or math.isinf(self._max_grad_norm):
            return 1.0
        coefficient = self._max_grad_norm / (norm + 1e-6)
        return 1.0 if coefficient > 1.0 else coefficient


OFF = Clipping()


class ClippingOption:
    """An attribute of the optimizer, kept in its Clipping, which the first use of one makes."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        return getattr(unwrapped(optimizer)._clipping or OFF, self._name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        check_flags({self._name: value})
        optimizer = unwrapped(optimizer)
        if optimizer._clipping is None:
            if value == getattr(OFF, self._name):
                return
            optimizer._clipping = Clipping()
            released = optimizer.__dict__.get("_released")
            if released is None:  # GradScaler then leaves unscaling and skipping to step()
                optimizer._step_supports_amp_scaling = True
            else:
                released._supported_scaling = True
        setattr(optimizer._clipping, self._name, value)


def begin(optimizer: FusedOptimizer, scaling: Scaling) -> bool:
    """Begin a step; return True if it measures its grads.

    Raises:
        ValueError: a group has differentiable=True.
        RuntimeError: other processes hold grads that no tensor here shows.
    """
    report = optimizer.__dict__.pop("_found_inf_to_report", None)
    if report is not None and optimizer._clipping is None:
        optimizer._clipping = Clipping()
    clipping = optimizer._clipping
    if clipping is None:
        return False
    clipping.report = report
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError("differentiable=True cannot be combined with options of one pass")
    # After unscale_(), the program may have put others into the grads than GradScaler has seen.
    is_checked = scaling.found_inf is not None and scaling.grad_scale is not None
    checks = report is not None or (clipping.skip_nonfinite and not is_checked)
    if not checks and clipping.max_grad_norm is None:
        return False
    if optimizer._has_some_params:
        sharding.refuse_some_params()
    if sharding.is_distributed():
        sharding.refuse_hidden_shards(p for g in optimizer.param_groups for p in g["params"])
    return True


def decide(
    optimizer: FusedOptimizer, scaling: Scaling, plan: Any, launcher: Any, waits: bool
) -> float | Tensor | None:
    """Read all grads, and return the coefficient that clips them.

    Args:
        plan: a _C.Plan that has gathered; None: torch.optim's code steps all params that have a grad.
        launcher: steps the plan's tensors on devices; None: it has none.
        waits: True if the host has to know the outcome.

    Returns:
        A number; a tensor where the device alone knows it; None: the step is skipped.
    """
    clipping = optimizer._clipping
    assert clipping is not None
    if plan is None:
        squares, nonfinite = 0.0, False
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    else:
        squares, nonfinite, sharded = plan.sum_of_squares(backends.num_threads())
        left = [optimizer.param_groups[g]["params"][i].grad for g, i, _ in plan.fallbacks() or ()]
        grads = left + sharded
    if launcher is not None:
        # The kernels leave it to the host to skip by what the host knows.
        on_device = launcher.measure(grads, waits or scaling.host_skips())
        if on_device is not None:
            clipping.grad_norm, clip = on_device
            return clip
        on_devices, bad = launcher.read()
        squares, nonfinite = squares + on_devices, nonfinite or bad
    more, bad = sum_of_squares(grads)
    norm = torch.tensor(math.sqrt(squares + more), dtype=torch.float64, device="cpu")
    if scaling.grad_scale is not None:
        # A tensor may be divided by 0, to which GradScaler halves its scale if all steps are skipped.
        norm /= scaling.grad_scale.item()
    clipping.grad_norm = norm
    is_bad = (nonfinite or bad) and clipping.skips
    if is_bad or (scaling.found_inf is not None and scaling.found_inf.item()):
        if clipping.report is not None:
            clipping.report.fill_(1.0)
        return None
    clip = clipping.coefficient(norm.item())
    if launcher is not None:
        launcher.decide(clip)
    return clip


def skip(optimizer: FusedOptimizer) -> None:
    """Count a skipped step, which changes nothing but grads that are to be zeroed."""
    clipping = optimizer._clipping
    if clipping is None:
        return
    clipping.n_skipped += 1
    if clipping.zero_grads:
        torch.optim.Optimizer.zero_grad(optimizer, set_to_none=False)


@torch.no_grad()
def sum_of_squares(grads: Iterable[Tensor]) -> tuple[float, bool]:
    """Sum the squares of grads of any kind.

    Returns:
        The sum in float64, of the whole tensors where they are DTensors, and whether some element is not
        finite.
    """
    total, nonfinite = 0.0, False
    sharded: sharding.ShardedSquares | None = None
    for grad in grads:
        if hasattr(grad, "device_mesh"):
            sharded = sharded or sharding.ShardedSquares()
            sharded.add(grad.detach())
            continue
        dense = grad.coalesce().values() if grad.is_sparse else grad
        wide = torch.complex128 if dense.is_complex() else torch.float64
        norm = torch.linalg.vector_norm(dense.detach(), dtype=wide).item()
        if not math.isfinite(norm):
            # The squares of large float64 numbers overflow without an infinite one among them.
            nonfinite |= dense.dtype != wide or not bool(dense.isfinite().all())
        total += norm * norm  # norm**2 would raise where it overflows
    if sharded is not None:
        squares = sharded.total()
        nonfinite |= not math.isfinite(squares)
        total += squares
    return total, nonfinite
