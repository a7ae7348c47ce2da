"""The optimizers that torch.optim lacks, in its style: what a tensor that no kernel serves is stepped by."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class _Plain(Optimizer):
    """One tensor after the other."""

    @abstractmethod
    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        """Append those that have a grad, and make first states."""

    @staticmethod
    @abstractmethod
    def _update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None: ...

    @_use_grad_for_differentiable
    def step(self, closure: Any = None) -> Any:
        """Perform a single optimization step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            states: list[dict[str, Tensor]] = []
            self._init_group(group, params, grads, states)
            for param, grad, state in zip(params, grads, states):
                self._update(param, -grad if group["maximize"] else grad, state, group)
        return loss


class Lion(_Plain):
    """Chen et al. 2023, algorithm 2. fused_optim.Lion says what it is."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        _check_lr(lr)
        _check_betas(betas, "two")
        _check_not_negative(weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A checkpoint of another library's Lion has lr, betas and weight_decay alone.
        for group in self.param_groups:
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Tensor]],
    ) -> None:
        for param, grad in _with_grads(group, "Lion"):
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = _zeros(param)
            params.append(param)
            grads.append(grad)
            states.append(state)

    @staticmethod
    def _update(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        lr, beta1, beta2 = map(_without_dimensions, (group["lr"], *group["betas"]))
        param, grad, exp_avg = map(_real, (param, grad, state["exp_avg"]))
        if group["weight_decay"] != 0:
            param.mul_(1 - lr * group["weight_decay"])
        direction = exp_avg.mul(beta1).add_(grad, alpha=1 - beta1).sign_()
        param.sub_(lr * direction)
        exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


def _check_lr(lr: float | Tensor) -> None:
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")


def _check_betas(betas: Sequence[float], number: str) -> None:
    if len(betas) != {"two": 2, "three": 3}[number]:
        raise ValueError(f"Invalid betas: {betas}, must be {number} numbers in [0, 1)")
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0.0:
            raise ValueError(f"Invalid {name} value: {value}")


def _with_grads(group: dict[str, Any], name: str) -> list[tuple[Tensor, Tensor]]:
    found = [(param, param.grad) for param in group["params"] if param.grad is not None]
    if any(grad.is_sparse for _, grad in found):
        raise RuntimeError(f"{name} does not support sparse gradients")
    return found


def _zeros(param: Tensor) -> Tensor:
    return torch.zeros_like(param, memory_format=torch.preserve_format)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if torch.is_complex(tensor) else tensor


def _without_dimensions(number: Any) -> Any:
    return number.squeeze() if isinstance(number, Tensor) else number
