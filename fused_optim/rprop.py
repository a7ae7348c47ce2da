"""Rprop. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Rprop(FusedOptimizer, torch.optim.Rprop):
    """Rprop on fused kernels; a drop-in for :class:`torch.optim.Rprop`.

    Elements of param have step sizes of their own, which begin with lr. With grad the gradient (negated
    if maximize)::

        step_size *= etas[1] if grad * prev > 0, etas[0] if grad * prev < 0
        step_size  = clamp(step_size, *step_sizes)
        grad       = 0 if grad * prev < 0
        param     -= step_size * sign(grad)
        prev       = grad

    It is for gradients of the whole dataset: those of batches change their signs by chance.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: the first step size, >= 0, a float or a tensor with one element (default: 1e-2).
        etas: factors of a step size where the sign of grad changes, in (0, 1), and where it stays, > 1
            (default: (0.5, 1.2)).
        step_sizes: smallest and largest step size (default: (1e-6, 50)).
        capturable, foreach, maximize, differentiable: as in torch.optim. foreach is accepted
            without effect; differentiable takes the stock path, capturable on the CPU too.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Riedmiller, Braun 1993, "A direct adaptive method for faster backpropagation learning: the RPROP
        algorithm", without weight backtracking.

    Difference from torch.optim:
        None but rounding: the sign of ``grad * prev`` is taken in float32. ``step_size`` stays float32 where
        ``state_dtype`` asks for fewer bits.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.Rprop([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.9, -1.9]
    """

    _rule = "rprop"
    _stock = torch.optim.Rprop
    _sparse_refusal = "Rprop does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
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
            etas=etas,
            step_sizes=step_sizes,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
        )
