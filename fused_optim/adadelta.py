"""Adadelta. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Adadelta(FusedOptimizer, torch.optim.Adadelta):
    """Adadelta on fused kernels; a drop-in for :class:`torch.optim.Adadelta`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``::

        square_avg = rho * square_avg + (1 - rho) * grad**2
        delta      = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * grad
        acc_delta  = rho * acc_delta + (1 - rho) * delta**2
        param     -= lr * delta

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: factor of delta, >= 0, a float or a tensor with one element (default: 1.0).
        rho: decay rate of both averages, in [0, 1] (default: 0.9).
        eps: added under both roots, >= 0 (default: 1e-6).
        weight_decay: >= 0 (default: 0).
        capturable, foreach, maximize, differentiable: as in torch.optim. foreach is accepted
            without effect; differentiable takes the stock path, capturable on the CPU too.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Zeiler 2012, "ADADELTA: An adaptive learning rate method", algorithm 1.

    Difference from torch.optim:
        None.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.Adadelta([param], lr=100.0)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.684, -1.684]
    """

    _rule = "adadelta"
    _stock = torch.optim.Adadelta
    _sparse_refusal = "Adadelta does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            foreach=foreach,
            capturable=capturable,
            maximize=maximize,
            differentiable=differentiable,
        )
