"""The options of every optimizer beside torch.optim's: their ranges, and where they may stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from fused_optim import backends
from fused_optim.wrappers import unwrapped


class OnePassOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer of this package, beside torch.optim's; all off by default.

    Attributes:
        max_grad_norm: > 0. All grads together are clipped to this 2-norm, as
            ``torch.nn.utils.clip_grad_norm_`` would before the step; ``grad_norm`` is what it was.
            An infinite one measures and never clips.
        write_clipped_grads: clip the grads themselves too, and not only the step (default: False).
        skip_nonfinite: a step for which some grad holds NaN or Inf changes nothing but
            ``skipped_steps`` (default: False).
        zero_grads: the step leaves zeros in the grads, as ``zero_grad(set_to_none=False)`` after it would;
            a skipped one too (default: False).
        ema_decay: in [0, 1). Each step that is not skipped averages all params, those without a grad
            too: ``ema = lerp(ema, param, 1 - ema_decay)``; the first one copies. None: no average.
            An option of param groups.
        ema_warmup: ``min(ema_decay, (1 + n) / (10 + n))`` after n averaged steps takes the place of
            ema_decay (default: False). An option of param groups.
        ema_dtype: torch.float32 keeps the averages of bfloat16 and float16 params in float32; None: like
            the param. An option of param groups.
    """

    max_grad_norm: float | None
    write_clipped_grads: bool
    skip_nonfinite: bool
    zero_grads: bool
    ema_decay: float | None
    ema_warmup: bool
    ema_dtype: torch.dtype | None


class FormatOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer of this package, beside torch.optim's; options of param groups.

    They hold for float32, bfloat16 and float16 params, DTensors among them; other tensor subclasses and
    dtypes keep torch.optim's states.

    Attributes:
        state_dtype: dtype of all states but ``step``. None: torch.optim's. torch.float32 or
            "float32". torch.bfloat16 or "bfloat16": second moments and the like are rounded
            stochastically. "int8": 8 bits an element and a bfloat16 scale for 64 of them, for
            states of at least 4,096 elements, whatever part a process holds; smaller ones are
            float32.
        master: precision of bfloat16 and float16 params. None: rounded to nearest, as torch.optim
            does. "stochastic": rounded up or down so that the mean is exact. "split8" and
            "split16": 8 or 16 more bits are kept beside the param, ``param_remainder``; 16 make a
            bfloat16 param an exact float32.
        rounding_seed: seed of the stochastic rounding, the same in each run (default: 0).
    """

    state_dtype: torch.dtype | str | None
    master: str | None
    rounding_seed: int


class KernelOptions(OnePassOptions, FormatOptions, total=False):
    """Keyword arguments of every optimizer of this package, beside torch.optim's."""


SCALE_BLOCK = 64  # elements of one scale of 8-bit states; csrc/kernel.h has the same

# Keys of a param group; in it only if the user gave some.
AVERAGING = ("ema_decay", "ema_warmup", "ema_dtype")
FORMATS = tuple(FormatOptions.__annotations__)
OF_OPTIMIZER = tuple(key for key in OnePassOptions.__annotations__ if key not in AVERAGING)

_STATE_DTYPES = (None, torch.float32, torch.bfloat16, "int8")
_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # as the command line has them
_MASTERS = (None, "stochastic", "split8", "split16")


def number(value: Any) -> float:
    """Convert to float; NaN, which no range includes, if it is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def state_dtype_of(group: Mapping[str, Any]) -> Any:
    """The group's state_dtype, with the name of a dtype replaced by the dtype."""
    state_dtype = group.get("state_dtype")
    return _NAMED.get(state_dtype, state_dtype) if isinstance(state_dtype, str) else state_dtype


def check(options: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError for options of a param group outside their range, or that nothing can serve.

    Args:
        where: text behind the name of an option that says which group has it.
    """
    check_formats(options, where)
    check_averaging(options, where)


def check_averaging(options: Mapping[str, Any], where: str = "") -> None:
    """Do what `check` does, for the options of averaging."""
    decay, dtype = options.get("ema_decay"), options.get("ema_dtype")
    if decay is not None and options.get("differentiable"):
        raise ValueError(f"differentiable=True cannot be combined with ema_decay{where}")
    if decay is not None and not 0 <= number(decay) < 1:
        raise ValueError(f"Invalid ema_decay{where}: {decay!r}; it must be in [0, 1) or None")
    if dtype not in (None, torch.float32):
        raise ValueError(f"Invalid ema_dtype{where}: {dtype}; it must be torch.float32 or None")


def check_formats(options: Mapping[str, Any], where: str = "") -> None:
    """Do what `check` does, for :class:`FormatOptions`."""
    state_dtype, master = state_dtype_of(options), options.get("master")
    # As in `x in _STATE_DTYPES`, but a str is never compared with a dtype.
    if not any(
        type(state_dtype) is type(known) and state_dtype == known for known in _STATE_DTYPES
    ):
        raise ValueError(
            f"Invalid state_dtype{where}: {state_dtype!r}; "
            'it must be torch.float32, torch.bfloat16, "int8" or None'
        )
    if master not in _MASTERS:
        raise ValueError(
            f'Invalid master{where}: {master!r}; it must be "stochastic", "split8", "split16" or None'
        )
    seed = options.get("rounding_seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**64:
        raise ValueError(f"Invalid rounding_seed{where}: {seed!r}; it must be an int in [0, 2**64)")
    if state_dtype is None and master is None:
        return
    if options.get("differentiable"):
        raise ValueError(
            f"differentiable=True cannot be combined with state_dtype or master{where}"
        )
    if backends.codec() is None:
        raise ValueError("state_dtype and master need the C++ kernels, which are not there")


def check_flags(options: Mapping[str, Any]) -> None:
    for key in ("write_clipped_grads", "skip_nonfinite", "zero_grads", "ema_warmup"):
        if not isinstance(options.get(key, False), bool):
            raise TypeError(f"Invalid {key}: {options[key]!r}; it must be True or False")


def check_max_grad_norm(value: Any) -> float | None:
    if value is None:
        return None
    if not number(value) > 0:
        raise ValueError(f"Invalid max_grad_norm: {value!r}; it must be > 0 or None")
    return number(value)


def check_all(options: Mapping[str, Any], cls: type) -> None:
    """Raise for keyword arguments of a constructor that are unknown or outside their range."""
    given = {key: value for key, value in options.items() if value is not None}
    check_formats(given)
    for key in options:
        if key not in KernelOptions.__annotations__:
            raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {key!r}")
    check_flags(options)
    check(given)
    check_max_grad_norm(options.get("max_grad_norm"))


def of_new_groups(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Choose the constructor's options that each param group gets; None: there are none."""
    given = {key: options[key] for key in FORMATS if options.get(key) is not None}
    averaging = {key: options[key] for key in AVERAGING if key in options}
    if any(value is not None and value is not False for value in averaging.values()):
        given |= averaging
    return given or None


def refuse_in_group(group: Mapping[str, Any]) -> None:
    """Raise where a param group has options of the optimizer, or a flag that is no bool."""
    for key in OF_OPTIMIZER:
        if key in group:
            raise ValueError(f"{key} is an option of the optimizer, not of a param group")
    check_flags(group)


class GroupOption:
    """Refuses an attribute of the optimizer that would be ignored: it is an option of groups."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._error = f"{name} is an option of param groups: optimizer.param_groups[0][{name!r}]"

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        try:
            return unwrapped(optimizer).__dict__[self._name]
        except KeyError:
            raise AttributeError(self._error) from None

    def __set__(self, optimizer: Any, value: Any) -> None:
        # A program that was patched means an attribute of its own.
        if not unwrapped(optimizer).__dict__.get("_is_patched"):
            raise AttributeError(self._error)
        unwrapped(optimizer).__dict__[self._name] = value
