"""The optimizers that torch.optim lacks, in its style: what a tensor that no kernel serves is stepped by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class Lion(Optimizer):
    """Chen et al. 2023, algorithm 2, one tensor after the other. fused_optim.Lion says what it is."""

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
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas}, must be two numbers in [0, 1)")
        for i, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
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
        exp_avgs: list[Tensor],
    ) -> None:
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError("Lion does not support sparse gradients")
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            params.append(param)
            grads.append(param.grad)
            exp_avgs.append(state["exp_avg"])

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
            exp_avgs: list[Tensor] = []
            self._init_group(group, params, grads, exp_avgs)
            for param, grad, exp_avg in zip(params, grads, exp_avgs):
                _step(param, grad, exp_avg, group)
        return loss


def _without_dimensions(number: Any) -> Any:
    return number.squeeze() if isinstance(number, Tensor) else number


def _step(param: Tensor, grad: Tensor, exp_avg: Tensor, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    lr, beta1, beta2 = map(_without_dimensions, (group["lr"], beta1, beta2))
    weight_decay = group["weight_decay"]
    if group["maximize"]:
        grad = -grad
    if torch.is_complex(param):
        param, grad, exp_avg = (torch.view_as_real(t) for t in (param, grad, exp_avg))
    if weight_decay != 0:
        param.mul_(1 - lr * weight_decay)
    direction = exp_avg.mul(beta1).add_(grad, alpha=1 - beta1).sign_()
    param.sub_(lr * direction)
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
