"""How far two loss curves may lie apart when two correct optimizers differ in rounding alone.

Training amplifies rounding: two correct implementations of one update start one unit in the last
place apart, and a few hundred steps later their losses may differ in the third digit. No constant
tells that from a defect, so the bound is measured on the training run itself, with stock
torch.optim and without the optimizer under test:

1. A *twin* repeats the stock run with rounding noise added on purpose. At every step each element
   of the params and of the state moves up or down, by a coin toss, by 2^-23 of the larger of its
   old and its new value, and the learning rate by 2^-23 of itself. That is at least what a correct
   implementation may differ by: from the old to the new value of an element, stock and we make
   about a dozen roundings together (AdamW: 7 and 6), each uniform within half a unit in the last
   place and so of variance 1/12, which add up to a variance of one unit. The scalars that all
   elements share (a step size, a bias correction) are rounded once to float32 on either side, at
   most one unit apart in all; the noise on the learning rate stands for them.
2. As long as differences are small, the loss difference at step t is a linear function of all
   noise before it: a sum of very many small independent terms, so Gaussian with mean zero. Ours has
   at most the variance of a twin's.
3. The ratio of one such Gaussian to the root mean square of `n_twins` others follows Student's t
   distribution with `n_twins` degrees of freedom, so its quantile is the factor by which we may
   exceed the twins. The quantile is taken at FALSE_ALARM / (2 * n_steps): two sides, and Bonferroni
   over the steps.
4. The spread is made non-decreasing in t, since a curve that has come apart may cross again; and it
   is at least one unit in the last place of the loss, below which a float32 loss shows nothing.

A defect is not noise: it acts in the same direction at each step and on all elements at once. A
beta2 of 0.998 in place of 0.999 exceeds the bound within the first epoch of digits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.optim import Optimizer

FLOAT32_EPS = torch.finfo(torch.float32).eps  # 2^-23, one unit in the last place of 1.0

# The chance that a correct optimizer's curve exceeds its bound at any step: the only free number.
FALSE_ALARM = 1e-3


def tolerance(stock: np.ndarray, twins: np.ndarray) -> np.ndarray:
    """The largest loss difference per step that rounding explains.

    Args:
        stock: losses of the stock run, shape (n_steps,).
        twins: losses of its noisy twins, shape (n_twins, n_steps).
    """
    n_twins, n_steps = twins.shape
    spread = np.sqrt(np.mean((twins - stock) ** 2, axis=0))
    spread = np.maximum.accumulate(np.maximum(spread, FLOAT32_EPS * np.abs(stock)))
    return stats.t.ppf(1 - FALSE_ALARM / (2 * n_steps), df=n_twins) * spread


def coin_tosser(seed: int) -> Callable[[Tensor], Tensor]:
    """What gives tensors of -1 and 1, of the shape and dtype of another tensor."""
    random = torch.Generator().manual_seed(seed)

    def coins(like: Tensor) -> Tensor:
        return torch.randint(2, like.shape, generator=random).to(like.dtype) * 2 - 1

    return coins


def add_rounding_noise(optimizer: Optimizer, seed: int) -> None:
    """Make `optimizer` a twin: every later step ends with the noise described above."""
    coins = coin_tosser(seed)
    before: dict[tuple[int, str], Tensor] = {}
    exact_lrs: list[float] = []

    def remember(optimizer: Optimizer, args: object, kwargs: object) -> None:
        before.update({key: stream.clone() for key, stream in _streams(optimizer).items()})
        exact_lrs[:] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            sign = coins(torch.zeros((), dtype=torch.float64)).item()
            group["lr"] *= 1 + sign * FLOAT32_EPS

    def add_noise(optimizer: Optimizer, args: object, kwargs: object) -> None:
        for group, exact_lr in zip(optimizer.param_groups, exact_lrs, strict=True):
            group["lr"] = exact_lr
        for key, stream in _streams(optimizer).items():
            size = stream.abs()
            if key in before:
                size = torch.maximum(size, before[key].abs())
            stream.add_(coins(stream) * size, alpha=FLOAT32_EPS)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(add_noise)


def _streams(optimizer: Optimizer) -> dict[tuple[int, str], Tensor]:
    """Every param and every state tensor but the step counts."""
    streams = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            streams[id(param), "param"] = param.detach()
            for name, value in optimizer.state.get(param, {}).items():
                if name != "step" and isinstance(value, Tensor):
                    streams[id(param), name] = value
    return streams
