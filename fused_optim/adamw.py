"""AdamW. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """AdamW on fused kernels; a drop-in for :class:`torch.optim.AdamW`.

    Like :class:`Adam`, but weight decay multiplies param by ``1 - lr * weight_decay`` before the
    update and never enters the moments.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-3).
        betas: decay rates of the two moments, each in [0, 1) (default: (0.9, 0.999)).
        eps: added to the denominator, >= 0 (default: 1e-8).
        weight_decay: >= 0 (default: 1e-2).
        amsgrad, maximize, foreach, capturable, differentiable, fused: as in :class:`Adam`.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range, with torch.optim's text where it has one.

    Reference:
        Loshchilov, Hutter 2019, "Decoupled weight decay regularization", algorithm 2.

    Difference from torch.optim:
        None but rounding, as in :class:`Adam`.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.AdamW([param], lr=0.1, weight_decay=0.5)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.85, -1.8]
    """

    _rule = "adam"
    _stock = torch.optim.AdamW
    _sparse_refusal = "Adam does not support sparse gradients, please consider SparseAdam instead"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
