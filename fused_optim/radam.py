"""RAdam. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class RAdam(FusedOptimizer, torch.optim.RAdam):
    """RAdam on fused kernels; a drop-in for :class:`torch.optim.RAdam`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``, at step t::

        exp_avg    = lerp(exp_avg, grad, 1 - beta1)
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
        rho_inf    = 2 / (1 - beta2) - 1
        rho        = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        r          = sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        step_size  = lr / (1 - beta1**t)
        param     -= step_size * exp_avg                        if rho <= 5: at the first 5 steps
        param     -= r * step_size * exp_avg * sqrt(1 - beta2**t) / (sqrt(exp_avg_sq) + eps)

    decoupled_weight_decay multiplies param by ``1 - lr * weight_decay`` instead of adding to grad.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-3).
        betas: decay rates of the two moments, each in [0, 1) (default: (0.9, 0.999)).
        eps: added to the denominator, >= 0 (default: 1e-8).
        weight_decay: >= 0 (default: 0).
        decoupled_weight_decay: (default: False).
        capturable, foreach, maximize, differentiable: as in torch.optim. foreach is accepted
            without effect; differentiable takes the stock path, capturable on the CPU too.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Liu et al. 2020, "On the variance of the adaptive learning rate and beyond", algorithm 2.

    Difference from torch.optim:
        None but rounding: the corrections are folded into one step size.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.RAdam([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.8, -1.6]
    """

    _rule = "radam"
    _stock = torch.optim.RAdam
    _sparse_refusal = "RAdam does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
