"""Adamax. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Adamax(FusedOptimizer, torch.optim.Adamax):
    """Adamax on fused kernels; a drop-in for :class:`torch.optim.Adamax`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``, at step t::

        exp_avg = lerp(exp_avg, grad, 1 - beta1)
        exp_inf = max(beta2 * exp_inf, abs(grad) + eps)
        param  -= lr / (1 - beta1**t) * exp_avg / exp_inf

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 2e-3).
        betas: decay rates of the average and of the maximum, each in [0, 1) (default: (0.9, 0.999)).
        eps: added to the size of grad, >= 0 (default: 1e-8).
        weight_decay: >= 0 (default: 0).
        capturable, foreach, maximize, differentiable: as in torch.optim. foreach is accepted
            without effect; differentiable takes the stock path, capturable on the CPU too.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Kingma, Ba 2015, "Adam: A method for stochastic optimization", algorithm 2, with eps as in
        torch.optim.

    Difference from torch.optim:
        None.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.Adamax([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.9, -1.9]
    """

    _rule = "adamax"
    _stock = torch.optim.Adamax
    _sparse_refusal = "Adamax does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )
