"""SGD. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_optim import sharding
from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class SGD(FusedOptimizer, torch.optim.SGD):
    """SGD with momentum on fused kernels; a drop-in for :class:`torch.optim.SGD`.

    With grad the gradient (negated if maximize) plus ``weight_decay * param``::

        momentum_buffer = grad at the first step, then
                          momentum * momentum_buffer + (1 - dampening) * grad
        param          -= lr * momentum_buffer

    nesterov: ``param -= lr * (grad + momentum * momentum_buffer)``; momentum == 0:
    ``param -= lr * grad`` without state.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-3).
        momentum: >= 0 (default: 0).
        dampening: (default: 0).
        weight_decay: >= 0 (default: 0).
        nesterov: needs momentum > 0 and dampening == 0 (default: False).
        maximize, foreach, differentiable, fused: as in torch.optim. foreach is accepted without
            effect; fused=True lets GradScaler leave unscaling to the step; differentiable takes the
            stock path.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Sutskever, Martens, Dahl, Hinton 2013, "On the importance of initialization and momentum in
        deep learning", with the learning rate outside the buffer as in torch.optim.

    Difference from torch.optim:
        None.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.SGD([param], lr=0.25, momentum=0.9)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> param.tolist()
        [0.5, -1.0]
    """

    _rule = "sgd"
    _stock = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """A momentum buffer as stock's clone of the weight-decayed grad lies in memory.

        The first step writes it. On a device, GradScaler may skip that without the host knowing; its
        values are zeros then.
        """
        if group["momentum"] == 0:  # there is none, but a state of another kind
            return {}
        grad = param.grad
        assert grad is not None
        if group["weight_decay"] == 0:
            return {"momentum_buffer": torch.zeros_like(grad, requires_grad=False)}
        whole, grad, param = grad, sharding.part_of(grad), sharding.part_of(param)
        shapes = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            for t in (grad, param)
        ]
        like = torch.empty_like(shapes[0].add(shapes[1]))
        buffer = torch.empty_strided(
            like.shape, like.stride(), dtype=like.dtype, device=param.device
        )
        return {"momentum_buffer": sharding.rebuilt(buffer.zero_(), whole)}
