"""Lion. The arithmetic stands in csrc/rules.h."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fused_optim import plain
from fused_optim.optimizer import FusedOptimizer
from fused_optim.options import KernelOptions

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack


class Lion(FusedOptimizer, plain.Lion):
    """Lion on fused kernels: the sign of a momentum, with decoupled weight decay.

    With grad the gradient (negated if maximize)::

        param   = (1 - lr * weight_decay) * param
        param  -= lr * sign(beta1 * exp_avg + (1 - beta1) * grad)
        exp_avg = beta2 * exp_avg + (1 - beta2) * grad

    Its one state takes half the memory of Adam's two. Every element moves by lr, so lr is 3 to 10 times
    smaller than AdamW's, and weight_decay as much larger.

    Args:
        params: iterable of parameters, named parameters or param groups.
        lr: learning rate, >= 0, a float or a tensor with one element (default: 1e-4).
        betas: weights of the momentum in the update, and of its past in the momentum, each in [0, 1)
            (default: (0.9, 0.99)).
        weight_decay: >= 0 (default: 0).
        maximize, foreach, differentiable: as in torch.optim. foreach is accepted without effect;
            differentiable takes the stock path.
        options: :class:`OnePassOptions`, for clipping, skipping, averaging and zeroing in the step;
            :class:`FormatOptions`, for smaller states and for bfloat16 and float16 params.

    Raises:
        ValueError: an argument outside its range.

    Reference:
        Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2.

    Difference from torch.optim:
        It has no Lion. What no kernel serves is stepped by plain PyTorch code of this package. As in the
        authors' code, the sign of NaN is 0: an element whose gradient is NaN moves by its weight decay
        alone, then and later.

    Example:
        >>> param = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = fused_optim.Lion([param], lr=0.1)
        >>> param.square().sum().backward()
        >>> optimizer.step()
        >>> [round(value, 3) for value in param.tolist()]
        [0.9, -1.9]
    """

    _rule = "lion"
    _stock = plain.Lion
    _sparse_refusal = "Lion does not support sparse gradients"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        **options: Unpack[KernelOptions],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
        )
