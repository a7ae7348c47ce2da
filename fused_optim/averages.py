"""Exponential moving averages (EMA) of the params: their entries, and those that no kernel moves.

An entry is a list ``[ema, n_averaged]``: the average, of the param's shape, and how many steps went into it,
a float32 tensor on the param's device where the host cannot know.
The kernels average in the step's own pass (csrc/averages.cpp); the arithmetic is the same here.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer

SWAPPED = "within swapped_ema(): the params hold their averages"
Entry = list  # [Tensor, int | Tensor]
Averages = dict[Tensor, Entry]


def entry_of(known: Averages, param: Tensor, group: dict[str, Any]) -> Entry:
    """The param's entry, made or made to fit if need be."""
    entry = known.get(param)
    if entry is None or entry[0].shape != param.shape or entry[0].device != param.device:
        entry = known[param] = create(param, group, entry)
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
    # float32 replaces coarser dtypes only; whole and complex numbers stay as they are.
    coarser = param.dtype in (torch.bfloat16, torch.float16)
    return wanted if wanted is not None and coarser else param.dtype


def weight(decay: Any, warmup: bool, n_averaged: Any) -> Any:
    """How far an average that is not the first moves towards the param; csrc/averages.cpp has the same.

    Args:
        decay, n_averaged: numbers, or float64 tensors.
    """
    if warmup:
        least = torch.minimum if isinstance(n_averaged, Tensor) else min
        decay = least(decay, (1 + n_averaged) / (10 + n_averaged))
    return 1 - decay


@torch.no_grad()
def move(left: list[tuple[Tensor, Any, Any]], found_inf: Tensor | None = None) -> None:
    """Move these averages towards their params by their weights, and count that.

    Args:
        left: a pair (decay, warmup) stands for the weight where n_averaged is a tensor; None for an output,
            a tensor that takes the place of the entry and becomes a copy.
        found_inf: not 0 if the step is skipped, where the device alone knows that.
    """
    together: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for param, entry, towards in left:
        if towards is None:
            entry.copy_(param)
            continue
        ema = entry[0]
        if isinstance(towards, tuple):
            decay, warmup = towards
            _move_on_device(param, entry, decay, warmup, found_inf)
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
        if towards is not None and not isinstance(towards, tuple):
            entry[1] += 1


def _move_on_device(
    param: Tensor, entry: Entry, decay: float, warmup: bool, found_inf: Tensor | None
) -> None:
    """`move` without waiting for the device."""
    ema, n_averaged = entry
    n = n_averaged.double()
    towards = torch.where(n == 0, 1.0, weight(torch.full_like(n, decay), warmup, n))
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


def averaged_params(param_groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """(group, param) of each param that is averaged."""
    for group in param_groups:
        if group.get("ema_decay") is not None:
            for param in group["params"]:
                yield group, param


def save(param_groups: list[dict[str, Any]], known: Averages) -> dict[int, dict[str, Any]]:
    """Return index of the param -> its average and count, for state_dict()."""
    params = (param for group in param_groups for param in group["params"])
    return {
        index: {"ema": known[param][0], "n_averaged": int(known[param][1])}
        for index, param in enumerate(params)
        if param in known
    }


def match(
    saved: dict[str, Any], param_groups: list[dict[str, Any]]
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Pair the averages that `save` wrote with the params of these groups.

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


def move_params(optimizer: FusedOptimizer, groups: list[dict[str, Any]], but: set[int]) -> None:
    """Move the averages of these groups' params without kernels, except ids in `but`."""
    known, left = optimizer._averages, []
    for group, param in averaged_params(groups):
        if id(param) not in but:
            entry = entry_of(known, param, group)
            decay, warmup = float(group["ema_decay"]), bool(group.get("ema_warmup"))
            n = int(entry[1])
            left.append((param, entry, weight(decay, warmup, n) if n > 0 else 1.0))
    move(left)


def forget_removed_params(optimizer: FusedOptimizer) -> None:
    """Drop the averages of params that are in no group any more: they would be kept for good."""
    known = optimizer._averages
    if len(known) > sum(len(group["params"]) for group in optimizer.param_groups):
        there = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for param in [param for param in known if id(param) not in there]:
            del known[param]


def of_params(optimizer: FusedOptimizer) -> list[Tensor]:
    """See :meth:`FusedOptimizer.ema_params`."""
    found = [
        entry_of(optimizer._averages, param, group)[0]
        for group, param in averaged_params(optimizer.param_groups)
    ]
    if not found:
        raise RuntimeError("no param group has an ema_decay")
    return found


@contextlib.contextmanager
def swapped(optimizer: FusedOptimizer) -> Iterator[None]:
    """See :meth:`FusedOptimizer.swapped_ema`."""
    averages, before = of_params(optimizer), optimizer._why_no_step
    if before == SWAPPED:
        raise RuntimeError("swapped_ema() is in use already")
    params = [param for _, param in averaged_params(optimizer.param_groups)]
    own = [param.detach().clone() for param in params]
    optimizer._why_no_step = SWAPPED
    try:
        for param, average in zip(params, averages):
            param.detach().copy_(average)
        yield
    finally:
        for param, values in zip(params, own):
            param.detach().copy_(values)
        optimizer._why_no_step = before
