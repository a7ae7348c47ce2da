"""RMSprop. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class RMSprop(FusedOptimizer, torch.optim.RMSprop):
    """RMSprop on fused kernels; a drop-in for :class:`torch.optim.RMSprop`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``::

        square_avg = alpha * square_avg + (1 - alpha) * grad**2
        param     -= lr * grad / (sqrt(square_avg) + eps)

    centered takes ``square_avg - grad_avg**2`` under the root, with
    ``grad_avg = lerp(grad_avg, grad, 1 - alpha)``; momentum > 0:
    ``momentum_buffer = momentum * momentum_buffer + grad / denominator`` and
    ``param -= lr * momentum_buffer``.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-2).
        alpha: smoothing constant, >= 0 (default: 0.99).
        eps: added after the square root, >= 0 (default: 1e-8).
        weight_decay: >= 0 (default: 0).
        momentum: >= 0 (default: 0).
        centered: (default: False).
        capturable, foreach, maximize, differentiable: as in torch.optim. foreach is accepted
            without effect; differentiable takes the stock path, capturable on the CPU too.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Tieleman, Hinton 2012, lecture 6e of "Neural networks for machine learning"; centered:
        Graves 2013, "Generating sequences with recurrent neural networks", equations 38 to 45, with
        eps outside the square root as in torch.optim.

    Difference from torch.optim:
        None.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.RMSprop([param], lr=0.01)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.9, -1.9]
    """

    _rule = "rmsprop"
    _stock = torch.optim.RMSprop
    _sparse_refusal = "RMSprop does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
