"""Exponential moving averages (EMA) of the params: their entries, and those that no kernel averages.

An entry is a list ``[ema, n_averaged]``: the average, of the param's shape, and how many steps went into it,
a float32 tensor on the param's device where the host cannot know.
The kernels average in the step's own pass (csrc/ema.cpp); the arithmetic is the same here.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Keys of a param group; in it only if the user gave some.
OPTIONS = ("ema_decay", "ema_warmup", "ema_dtype")

Entry = list  # [Tensor, int | Tensor]
Emas = dict[Tensor, Entry]


def number(value: Any) -> float:
    """NaN, which no range includes, in place of what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def check(options: dict[str, Any]) -> None:
    """Raise ValueError for options of a param group outside their range."""
    decay = options.get("ema_decay")
    if decay is not None and options.get("differentiable"):
        raise ValueError("differentiable=True cannot be combined with ema_decay")
    if decay is not None and not 0 <= number(decay) < 1:
        raise ValueError(f"Invalid ema_decay: {decay!r}; it must be in [0, 1) or None")
    dtype = options.get("ema_dtype")
    if dtype not in (None, torch.float32):
        raise ValueError(f"Invalid ema_dtype: {dtype}; it must be torch.float32 or None")


def entry_of(emas: Emas, param: Tensor, group: dict[str, Any]) -> Entry:
    """The param's entry, made or made to fit if need be."""
    entry = emas.get(param)
    if entry is None or entry[0].shape != param.shape or entry[0].device != param.device:
        entry = emas[param] = create(param, group, entry)
    return entry


# Averages outlive an inference mode in which they are asked for first.
@torch.inference_mode(False)
@torch.no_grad()
def create(param: Tensor, group: dict[str, Any], entry: Entry | None = None) -> Entry:
    """A new entry, or one that no longer fits its param made to fit."""
    if entry is not None and entry[0].shape == param.shape:
        n_averaged = entry[1]
        if isinstance(n_averaged, Tensor):
            n_averaged = n_averaged.to(param.device)
        return [entry[0].to(param.device), n_averaged]
    return [
        torch.empty_like(param, dtype=dtype_of(param, group), requires_grad=False).copy_(param),
        0,
    ]


def dtype_of(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    wanted = group.get("ema_dtype")
    # float32 means what is coarser; whole and complex numbers stay what they are.
    coarser = param.dtype in (torch.bfloat16, torch.float16)
    return wanted if wanted is not None and coarser else param.dtype


def weight(group: dict[str, Any], n_averaged: int) -> float:
    """How far the next average moves towards the param; csrc/ema.cpp has the same."""
    decay = float(group["ema_decay"])
    if group.get("ema_warmup"):
        decay = min(decay, (1 + n_averaged) / (10 + n_averaged))
    return 1.0 if n_averaged == 0 else 1 - decay


@torch.no_grad()
def average(left: list[tuple[Tensor, Entry, Any]], found_inf: Tensor | None = None) -> None:
    """Move these averages towards their params by their weights, and count that.

    Args:
        left: a pair (decay, warmup) stands for the weight where n_averaged is a tensor.
        found_inf: not 0 if the step is skipped, where the device alone knows that.
    """
    together: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for param, entry, towards in left:
        ema = entry[0]
        if isinstance(towards, tuple):
            decay, warmup = towards
            _average_on_device(param, entry, decay, warmup, found_inf)
        elif towards == 1:
            ema.copy_(param)
        elif not ema.dtype.is_floating_point and not ema.is_complex():
            ema.copy_(ema * (1 - towards) + param * towards)
        elif type(ema) is not Tensor:
            ema.lerp_(param.detach().to(ema.dtype), towards)
        else:
            emas, params = together[ema.device, ema.dtype, towards]
            emas.append(ema)
            params.append(param.detach().to(ema.dtype))
    for (_, _, towards), (emas, params) in together.items():
        torch._foreach_lerp_(emas, params, towards)  # pyright: ignore[reportPrivateImportUsage]
    for _, entry, towards in left:
        if not isinstance(towards, tuple):
            entry[1] += 1


def _average_on_device(
    param: Tensor, entry: Entry, decay: float, warmup: bool, found_inf: Tensor | None
) -> None:
    """`weight` and `average` without waiting for the device."""
    ema, n_averaged = entry
    n = n_averaged.double()
    decayed = torch.full_like(n, decay)
    if warmup:
        decayed = torch.minimum(decayed, (1 + n) / (10 + n))
    towards = torch.where(n == 0, 1.0, 1 - decayed)
    if ema.dtype.is_floating_point or ema.is_complex():
        # As torch.lerp by a number: 16-bit types have a weight in float32.
        wide = torch.promote_types(ema.dtype, torch.float32)
        moved = torch.lerp(ema.to(wide), param.detach().to(ema.dtype).to(wide), towards.to(wide))
    else:
        moved = ema * (1 - towards) + param * towards
    moved = torch.where(towards == 1, param.detach().to(ema.dtype), moved.to(ema.dtype))
    if found_inf is not None:
        goes_on = found_inf.to(ema.device, non_blocking=True) == 0
        moved = torch.where(goes_on, moved, ema)
        n_averaged.add_(goes_on)
    else:
        n_averaged.add_(1)
    ema.copy_(moved)


def groups_with_ema(param_groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """(group, param) of each param that is averaged."""
    for group in param_groups:
        if group.get("ema_decay") is not None:
            for param in group["params"]:
                yield group, param


def save(param_groups: list[dict[str, Any]], emas: Emas) -> dict[int, dict[str, Any]]:
    """For state_dict(): index of the param -> its average and count."""
    params = (param for group in param_groups for param in group["params"])
    return {
        index: {"ema": emas[param][0], "n_averaged": int(emas[param][1])}
        for index, param in enumerate(params)
        if param in emas
    }


def match(
    saved: dict[str, Any], param_groups: list[dict[str, Any]]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """What `save` wrote, with the params of these groups.

    Raises:
        ValueError: an average has another shape than its param.
    """
    matched = []
    if not saved.get("ema"):
        return matched
    for saved_group, group in zip(saved["param_groups"], param_groups):
        for index, param in zip(saved_group["params"], group["params"]):
            entry = saved["ema"].get(index)
            if entry is None:
                continue
            if entry["ema"].shape != param.shape:
                raise ValueError(
                    f"loaded state dict has an EMA of shape {tuple(entry['ema'].shape)} for param "
                    f"{index}, which has shape {tuple(param.shape)}"
                )
            matched.append((param, entry))
    return matched


@torch.inference_mode(False)
@torch.no_grad()
def load(param: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> Entry:
    """An entry for this param with a saved average."""
    average = torch.empty_like(param, dtype=dtype_of(param, group), requires_grad=False)
    return [average.copy_(saved["ema"]), int(saved["n_averaged"])]


@contextlib.contextmanager
def swapped(emas: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Each param holds its average, given with it, and gets its own values back at the end."""
    own = [param.detach().clone() for param, _ in emas]
    try:
        for param, ema in emas:
            param.detach().copy_(ema)
        yield
    finally:
        for (param, _), values in zip(emas, own):
            param.detach().copy_(values)
