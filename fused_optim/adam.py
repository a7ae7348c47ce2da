"""Adam. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Adam(FusedOptimizer, torch.optim.Adam):
    """Adam on fused kernels; a drop-in for :class:`torch.optim.Adam`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``, at step t::

        exp_avg    = lerp(exp_avg, grad, 1 - beta1)
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad**2
        step_size  = lr * sqrt(1 - beta2**t) / (1 - beta1**t)
        param     -= step_size * exp_avg / (sqrt(exp_avg_sq) + eps * sqrt(1 - beta2**t))

    amsgrad divides by the largest exp_avg_sq so far; decoupled_weight_decay multiplies param by
    ``1 - lr * weight_decay`` instead of adding to grad.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-3).
        betas: decay rates of the two moments, each in [0, 1) (default: (0.9, 0.999)).
        eps: added to the denominator, >= 0 (default: 1e-8).
        weight_decay: >= 0 (default: 0).
        amsgrad, maximize, capturable, differentiable, foreach, fused, decoupled_weight_decay: as in
            torch.optim. foreach is accepted without effect; fused=True lets GradScaler leave
            unscaling to the step; differentiable takes the stock path, capturable on the CPU too.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Kingma, Ba 2015, "Adam: A method for stochastic optimization", algorithm 1, in the form of
        the end of section 2. AMSGrad: Reddi, Kale, Kumar 2018, algorithm 2.

    Difference from torch.optim:
        None but rounding: the bias corrections are folded into step_size and eps.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.Adam([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.9, -1.9]
    """

    _rule = "adam"
    _stock = torch.optim.Adam
    _sparse_refusal = "Adam does not support sparse gradients, please consider SparseAdam instead"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
