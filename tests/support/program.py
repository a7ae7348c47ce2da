"""Steps from the same numbers every time, and the bits that they leave.

Compared are all bits; a NaN is a NaN, whatever its payload and sign.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_optim import _C
from support.cases import BACKEND, DEVICE

Streams = dict[str, Tensor]
# States that are one number.
SCALARS = {key for rule in _C.rules().values() for key in rule["scalars"]}
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def begun(states: dict) -> dict:
    """These states of a param, or none where torch.optim has none.

    Where the device decides, the host makes the states of a first step that is then skipped: as they are
    before a first step, `step` 0 included.
    """
    counts = [states["step"]] if "step" in states else states.values()
    tensors = [value for value in counts if torch.is_tensor(value)]
    return {} if BACKEND == "triton" and not any(value.any() for value in tensors) else states


class Program:
    """An optimizer over `params`, stepped with the grads that `feed` gives for each step from 0 on."""

    def __init__(
        self,
        opt: Any,
        params: Sequence[Tensor],
        feed: Callable[[int], Sequence[Tensor]] | None = None,
    ) -> None:
        self.opt = opt
        self.params = list(params)
        self.feed = feed
        self.n_steps = 0

    def set_grads(self) -> None:
        assert self.feed is not None
        for param, grad in zip(self.params, self.feed(self.n_steps)):
            param.grad = grad

    def step(self, n_steps: int = 1) -> None:
        for _ in range(n_steps):
            self.set_grads()
            self.step_as_is()

    def step_as_is(self) -> None:
        """A step with the grads the program has put there."""
        self.opt.step()
        self.n_steps += 1

    def state(self, param: Tensor) -> dict[str, Any]:
        return begun(self.opt.state.get(param, {}))

    def harvest(self) -> Streams:
        """Params and states."""
        found = {}
        for i, param in enumerate(self.params):
            found[f"param {i}"] = param.detach().clone()
            for key, value in self.state(param).items():
                found[f"{key} {i}"] = value.detach().clone()
        return found

    def harvest_all(self) -> Streams:
        """With grads, and what one pass has measured."""
        found = self.harvest()
        for i, param in enumerate(self.params):
            if param.grad is not None:
                found[f"grad {i}"] = param.grad.detach().clone()
        if self.opt.grad_norm is not None:
            found["norm"] = self.opt.grad_norm.clone()
        found["skipped"] = self.opt.skipped_steps.clone()
        return found


def joined(streams: Streams) -> Streams:
    """The elements of all params in a row, in logical order, and those of each state; without scalars."""
    parts: dict[str, list[Tensor]] = {}
    for name, value in streams.items():
        if name.split()[0] not in SCALARS:
            parts.setdefault(name.split()[0], []).append(value.reshape(-1))
    return {key: torch.cat(values) for key, values in parts.items()}


def bits(tensor: Tensor) -> Tensor:
    """The bits of every element in logical order, with one NaN for all."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
    if tensor.is_floating_point():
        tensor[tensor.isnan()] = float("nan")
    return tensor.view(WORDS[tensor.dtype.itemsize])


def assert_same_bits(left: Streams | Sequence[Tensor], right: Streams | Sequence[Tensor]) -> None:
    """Of tensors on any device, by name or in one order."""
    mine, others = (
        streams if isinstance(streams, dict) else {str(i): t for i, t in enumerate(streams)}
        for streams in (left, right)
    )
    assert mine.keys() == others.keys(), mine.keys() ^ others.keys()
    for key, value in mine.items():
        other = others[key]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), key
        differ = (bits(value.cpu()) != bits(other.cpu())).nonzero().flatten()
        assert len(differ) == 0, f"{key}: {len(differ)} elements differ, first {differ[0]}"


@functools.lru_cache(maxsize=32)
def wild(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of all sizes; every 13th a subnormal, and now and then 0, -0, Inf, NaN, max."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    values = torch.randn(numel, dtype=torch.float64, generator=generator)
    values *= torch.exp2(torch.randint(-12, 6, (numel,), generator=generator).double())
    values[::13] = info.tiny * torch.randn(values[::13].shape, generator=generator).double()
    specials = (
        0.0,
        -0.0,
        float("inf"),
        -float("inf"),
        float("nan"),
        info.max,
        info.tiny * info.eps,
    )
    for i, special in enumerate(specials):
        values[seed % 7 + 5 + i :: 211] = special
    return values.to(dtype).to(DEVICE)


def tame(numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of unit size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, dtype=torch.float64, generator=generator).to(dtype)
