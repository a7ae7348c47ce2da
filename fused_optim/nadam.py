"""NAdam. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class NAdam(FusedOptimizer, torch.optim.NAdam):
    """NAdam on fused kernels; a drop-in for :class:`torch.optim.NAdam`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``, at step t::

        mu(t)       = beta1 * (1 - 0.5 * 0.96**(t * momentum_decay))
        mu_product *= mu(t)
        exp_avg     = lerp(exp_avg, grad, 1 - beta1)
        exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * grad**2
        direction   = (1 - mu(t)) / (1 - mu_product) * grad
                      + mu(t + 1) / (1 - mu_product * mu(t + 1)) * exp_avg
        param      -= lr * direction / (sqrt(exp_avg_sq / (1 - beta2**t)) + eps)

    decoupled_weight_decay multiplies param by ``1 - lr * weight_decay`` instead of adding to grad.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 2e-3).
        betas: decay rates of the two moments, each in [0, 1) (default: (0.9, 0.999)).
        eps: added to the denominator, >= 0 (default: 1e-8).
        weight_decay: >= 0 (default: 0).
        momentum_decay: >= 0 (default: 4e-3).
        decoupled_weight_decay: (default: False).
        capturable, foreach, maximize, differentiable: as in torch.optim. foreach is accepted
            without effect; differentiable takes the stock path, capturable on the CPU too.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 2.

    Difference from torch.optim:
        None but rounding: the bias corrections are folded into step sizes and eps. ``load_state_dict`` keeps
        ``mu_product`` in float32, where torch.optim rounds it to a 16-bit param's dtype.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.NAdam([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.894, -1.894]
    """

    _rule = "nadam"
    _stock = torch.optim.NAdam
    _sparse_refusal = "NAdam does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            momentum_decay=momentum_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )
