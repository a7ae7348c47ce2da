"""ASGD. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class ASGD(FusedOptimizer, torch.optim.ASGD):
    """Averaged SGD on fused kernels; a drop-in for :class:`torch.optim.ASGD`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``, at step t::

        param = param * (1 - lambd * eta) - eta * grad
        ax   += (param - ax) * mu               a copy of param while mu is 1
        eta   = lr / (1 + lambd * lr * t)**alpha
        mu    = 1 / max(1, t - t0)

    ``state[param]["ax"]`` is the average of param since step t0. ``ema_decay`` makes an exponential one.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-2).
        lambd: decay of param (default: 1e-4).
        alpha: power of the decay of eta (default: 0.75).
        t0: the step that averaging starts at (default: 1e6).
        weight_decay: >= 0 (default: 0).
        capturable, foreach, maximize, differentiable: as in torch.optim. foreach is accepted
            without effect; differentiable takes the stock path, capturable on the CPU too.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Polyak, Juditsky 1992, "Acceleration of stochastic approximation by averaging"; the decay of the
        learning rate: Bottou 2012, "Stochastic gradient descent tricks".

    Difference from torch.optim:
        None in a step. ``load_state_dict`` keeps ``eta`` and ``mu`` in float32, where torch.optim rounds them
        to a 16-bit param's dtype. ``ax`` stays float32 where ``state_dtype`` asks for fewer bits.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.ASGD([param], lr=0.25)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.5, -1.0]
    """

    _rule = "asgd"
    _stock = torch.optim.ASGD
    _sparse_refusal = "ASGD does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            lambd=lambd,
            alpha=alpha,
            t0=t0,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if param.is_cuda and not isinstance(group["lr"], Tensor):
            # As a number it would be copied there, which waits for the device.
            lr = torch.full((), group["lr"], dtype=torch.float64, device=param.device)
            group = {**group, "lr": lr}
        return super()._create_state(param, group)
