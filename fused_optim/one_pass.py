"""What a training loop does around step(), done within it: norm, clip, skip, EMA, zero."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from fused_optim import backends, ema, sharding
from fused_optim.grads import sum_of_squares
from fused_optim.wrappers import unwrapped


class OnePassOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer of this package, beside torch.optim's; all off by default.

    Attributes:
        max_grad_norm: > 0. All grads together are clipped to this 2-norm, as
            ``torch.nn.utils.clip_grad_norm_`` would before the step; ``grad_norm`` is what it was.
            An infinite one measures and never clips.
        write_clipped_grads: whether the grads are clipped too, and not only what the step makes of them
            (default: False).
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


class OnePass:
    """The options that concern all grads together, and what the latest step measured.

    Attributes:
        grad_norm: float64, the latest total norm; None before.
        clip: what the step under way multiplies the grads by; a tensor where the device alone knows.
        report: where GradScaler wants to read, after the step under way, whether grads were finite.
        n_skipped: how many steps the host has skipped.
        n_skipped_on_device: int64, how many a device has; None: it has skipped none.
    """

    def __init__(self) -> None:
        self._max_grad_norm: float | None = None
        self.write_clipped_grads = False
        self.skip_nonfinite = False
        self.zero_grads = False
        self.grad_norm: Tensor | None = None
        self.clip: float | Tensor = 1.0
        self.report: Tensor | None = None
        self.n_skipped = 0
        self.n_skipped_on_device: Tensor | None = None

    @property
    def max_grad_norm(self) -> float | None:
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None:
            number = ema.number(value)
            if not number > 0:
                raise ValueError(f"Invalid max_grad_norm: {value!r}; it must be > 0 or None")
            value = number
        self._max_grad_norm = value

    @property
    def skips(self) -> bool:
        """Whether the step under way is skipped if a grad is not finite."""
        return self.skip_nonfinite or self.report is not None

    def coefficient(self, norm: float) -> float:
        """As torch.nn.utils.clip_grad_norm_ has it: NaN for a NaN."""
        if self._max_grad_norm is None or math.isinf(self._max_grad_norm):
            return 1.0
        coefficient = self._max_grad_norm / (norm + 1e-6)
        return 1.0 if coefficient > 1.0 else coefficient


_OFF = OnePass()
_OF_OPTIMIZER = OnePassOptions.__annotations__.keys() - {*ema.OPTIONS}


def _check_flags(options: Mapping[str, Any]) -> None:
    for key in ("write_clipped_grads", "skip_nonfinite", "zero_grads", "ema_warmup"):
        if not isinstance(options.get(key, False), bool):
            raise TypeError(f"Invalid {key}: {options[key]!r}; it must be True or False")


def refuse_in_group(param_group: Mapping[str, Any]) -> None:
    """Raise where a param group has options of the optimizer, or a flag that is no bool."""
    for key in _OF_OPTIMIZER & param_group.keys():
        raise ValueError(f"{key} is an option of the optimizer, not of a param group")
    _check_flags(param_group)


class _Option:
    """An attribute of the optimizer that is kept in its OnePass, which only those have who use one."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        return getattr(unwrapped(optimizer)._one_pass or _OFF, self._name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        _check_flags({self._name: value})
        optimizer = unwrapped(optimizer)
        if optimizer._one_pass is None:
            if value == getattr(_OFF, self._name):
                return
            optimizer._one_pass = OnePass()
            released = optimizer.__dict__.get("_released")
            if released is None:  # see _take_one_pass
                optimizer._step_supports_amp_scaling = True
            else:
                released._supported_scaling = True
        setattr(optimizer._one_pass, self._name, value)


class GroupOption:
    """In place of an attribute of the optimizer that would be ignored: param groups have this option."""

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


class OnePassOptimizer(torch.optim.Optimizer):
    """The options of :class:`OnePassOptions` and what they offer; FusedOptimizer's step heeds them.

    ``max_grad_norm, write_clipped_grads, skip_nonfinite`` and ``zero_grads`` are attributes that may be
    changed between two steps. They are the program's, not the checkpoint's: loading one leaves them alone.
    """

    _one_pass: OnePass | None = None
    _ema_options: dict[str, Any] | None = None  # what a new param group gets
    _emas: ema.Emas  # param -> entry; there once it is needed
    _found_inf_to_report: Tensor  # there while a GradScaler waits for it
    _is_swapped = False
    _has_some_params = False  # of a model, the rest being another process's

    max_grad_norm = _Option()
    write_clipped_grads = _Option()
    skip_nonfinite = _Option()
    zero_grads = _Option()

    ema_decay = GroupOption()
    ema_warmup = GroupOption()
    ema_dtype = GroupOption()

    def _take_one_pass(self, options: OnePassOptions) -> None:
        """Check and keep these arguments of the constructor; before torch.optim's begins."""
        for key in options:
            if key not in OnePassOptions.__annotations__:
                raise TypeError(
                    f"{type(self).__name__}.__init__() got an unexpected keyword argument {key!r}"
                )
        _check_flags(options)
        ema.check(dict(options))
        given = {key: value for key, value in options.items() if key in ema.OPTIONS}
        if any(value is not None and value is not False for value in given.values()):
            self._ema_options = given
        self.max_grad_norm = options.get("max_grad_norm")
        self.write_clipped_grads = options.get("write_clipped_grads", False)
        self.skip_nonfinite = options.get("skip_nonfinite", False)
        self.zero_grads = options.get("zero_grads", False)
        if sharding.is_distributed() and sharding.is_built_for_some_params():
            self._has_some_params = True
            if self.max_grad_norm is not None or self.skip_nonfinite:
                sharding.refuse_some_params()
        if self._one_pass is not None or self._ema_options is not None:
            # GradScaler then leaves unscaling and skipping to step().
            self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; ``ema_decay``, ``ema_warmup`` and ``ema_dtype`` may differ by group."""
        if isinstance(param_group, dict):
            refuse_in_group(param_group)
            for key, value in (unwrapped(self)._ema_options or {}).items():
                param_group.setdefault(key, value)
            ema.check({"differentiable": self.defaults.get("differentiable"), **param_group})
        super().add_param_group(param_group)

    @property
    def grad_norm(self) -> Tensor | None:
        """2-norm of all grads (unscaled, not clipped) in the latest step that measured it.

        A float64 tensor without dimensions, on the device that all grads lie on, else on the CPU; None
        before the first such step. Steps measure with max_grad_norm, or with skip_nonfinite unless
        GradScaler has looked for Inf itself; steps that are then skipped measure too.

        Nothing waits for a device that all grads lie on. If they lie on several, or torch.optim's own
        code steps some of them and the step may be skipped, step() waits.
        """
        return (unwrapped(self)._one_pass or _OFF).grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """The number of skipped steps, int64 without dimensions.

        By skip_nonfinite; by GradScaler if ``max_grad_norm``, ``skip_nonfinite`` or ``zero_grads`` is in use.
        """
        one_pass = unwrapped(self)._one_pass or _OFF
        if one_pass.n_skipped_on_device is None:
            return torch.tensor(one_pass.n_skipped, device="cpu")
        return one_pass.n_skipped_on_device + one_pass.n_skipped

    def ema_params(self) -> list[Tensor]:
        """The averages of the params in groups with an ema_decay, in the params' order.

        They are the optimizer's own, of the params' shapes; before the first step, copies of the params.

        Raises:
            RuntimeError: no param group has an ema_decay.
        """
        emas = unwrapped(self)._all_emas()
        groups = ema.groups_with_ema(self.param_groups)
        averages = [ema.entry_of(emas, param, group)[0] for group, param in groups]
        if not averages:
            raise RuntimeError("no param group has an ema_decay")
        return averages

    @contextlib.contextmanager
    def swapped_ema(self) -> Iterator[None]:
        """Within the context, params hold their averages: ``with opt.swapped_ema(): evaluate()``.

        The params' own values are kept in copies meanwhile and come back at the end, whatever happens.

        Raises:
            RuntimeError: no param group has an ema_decay, or the params are swapped already; and, within
                the context, from step().
        """
        self = unwrapped(self)
        averages = self.ema_params()
        if self._is_swapped:
            raise RuntimeError("swapped_ema() is in use already")
        params = [param for _, param in ema.groups_with_ema(self.param_groups)]
        self._is_swapped = True
        try:
            with ema.swapped(list(zip(params, averages))):
                yield
        finally:
            self._is_swapped = False

    def _all_emas(self) -> ema.Emas:
        return self.__dict__.setdefault("_emas", {})

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, which can load it; averages, if there are any, under the key "ema"."""
        with self._without("_optimizer_state_dict_post_hooks") as hooks:
            saved = self._saved()
        averages = ema.save(self.param_groups, unwrapped(self)._all_emas())
        if averages:
            saved["ema"] = averages
        for hook in hooks:
            result = hook(self, saved)
            saved = saved if result is None else result
        return saved

    @contextlib.contextmanager
    def _without(self, hooks: str) -> Iterator[list[Callable[..., Any]]]:
        """Hooks that the caller runs itself, so that they see the averages."""
        registered = getattr(self, hooks)
        setattr(self, hooks, OrderedDict())
        try:
            yield list(registered.values())
        finally:
            setattr(self, hooks, registered)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's. Without averages in the state_dict, averaging begins anew.

        Options of averaging that the saved groups lack, as torch.optim's do, stay what they are.

        Raises:
            ValueError: as torch.optim's; or an average has another shape than its param, and nothing was
                loaded.
        """
        with self._without("_optimizer_load_state_dict_pre_hooks") as hooks:
            state_dict = state_dict.copy()
            for hook in hooks:
                result = hook(self, state_dict)
                state_dict = state_dict if result is None else result
            matched = ema.match(state_dict, self.param_groups)
            before = [{key: g[key] for key in ema.OPTIONS if key in g} for g in self.param_groups]
            with self._without("_optimizer_load_state_dict_post_hooks") as post_hooks:
                self._load(state_dict)
        for group, options in zip(self.param_groups, before):
            for key, value in options.items():
                group.setdefault(key, value)
        groups = {id(p): g for g, p in ema.groups_with_ema(self.param_groups)}
        self._emas = {
            param: ema.load(param, groups[id(param)], entry)
            for param, entry in matched
            if id(param) in groups
        }
        for hook in post_hooks:
            hook(self)

    def _saved(self) -> dict[str, Any]:
        return super().state_dict()

    def _load(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_one_pass", "_ema_options", "_emas")
        return {**super().__getstate__(), **{k: v for k, v in vars(self).items() if k in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Stock loses this when pickled. The constructor's arguments decide, not a group's flag: that
        # may have arrived with a checkpoint.
        if "_step_supports_amp_scaling" not in self.__dict__ and (
            self.defaults.get("fused") or self._one_pass or self._ema_options
        ):
            self._step_supports_amp_scaling = True

    def _begin_one_pass(self, found_inf: Tensor | None) -> Callable[..., float | None] | None:
        """What the step calls when the grads are summed up; None if they need not be."""
        report = self.__dict__.pop("_found_inf_to_report", None)
        if report is not None and self._one_pass is None:
            self._one_pass = OnePass()
        one_pass = self._one_pass
        if one_pass is None:
            return None
        one_pass.clip = 1.0
        one_pass.report = report
        if any(group.get("differentiable") for group in self.param_groups):
            raise ValueError("differentiable=True cannot be combined with options of one pass")
        # After unscale_(), the program may have put others into the grads than GradScaler has seen.
        is_checked = found_inf is not None and getattr(self, "grad_scale", None) is not None
        checks = report is not None or (one_pass.skip_nonfinite and not is_checked)
        if not checks and one_pass.max_grad_norm is None:
            return None
        if self._has_some_params:
            sharding.refuse_some_params()
        if sharding.is_distributed():
            sharding.refuse_hidden_shards(p for g in self.param_groups for p in g["params"])
        return self._measured

    def _measured(
        self,
        squares: float,
        nonfinite: bool,
        fallbacks: list | None,
        launcher: Any,
        waits: bool,
        sharded: Sequence[Tensor] = (),
    ) -> float | None:
        """What the grads that CPU kernels read sum up to -> the clip coefficient, None to skip.

        A launcher that steps some tensors measures their grads; the host waits for that if `waits`, or if it
        has to. Grads of fallbacks and `sharded` ones are measured here.
        """
        one_pass = self._one_pass
        assert one_pass is not None
        grads = [self.param_groups[g]["params"][i].grad for g, i, _ in fallbacks or ()] + [*sharded]
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):
            found_inf = None
        if launcher is not None:
            # The kernels leave it to the host to skip by what the host knows.
            known = found_inf is not None and backends.host_knows(found_inf) and found_inf.item()
            on_device = launcher.measure(grads, waits or bool(known))
            if on_device is not None:
                one_pass.grad_norm, one_pass.clip = on_device
                return 1.0
            on_devices, bad = launcher.read()
            squares, nonfinite = squares + on_devices, nonfinite or bad
        more, bad = sum_of_squares(grads)
        norm = torch.tensor(math.sqrt(squares + more), dtype=torch.float64, device="cpu")
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            # A tensor may be divided by 0, to which GradScaler halves its scale if all steps are skipped.
            norm /= grad_scale.item()
        one_pass.grad_norm = norm
        is_bad = (nonfinite or bad) and one_pass.skips
        if is_bad or (found_inf is not None and found_inf.item()):
            if one_pass.report is not None:
                one_pass.report.fill_(1.0)
            self._skip()
            return None
        clip = one_pass.clip = one_pass.coefficient(norm.item())
        if launcher is not None:
            launcher.decide(clip)
        return clip

    def _average(self, groups: list[dict[str, Any]], but: set[int]) -> None:
        """Average params without kernels, all of these groups but those with an id in `but`."""
        emas, left = self._all_emas(), []
        for group, param in ema.groups_with_ema(groups):
            if id(param) not in but:
                entry = ema.entry_of(emas, param, group)
                left.append((param, entry, ema.weight(group, int(entry[1]))))
        ema.average(left)

    def _forget_removed_params(self) -> None:
        """Averages of params that are in no group any more would be kept for good."""
        if len(self._emas) > sum(len(group["params"]) for group in self.param_groups):
            there = {id(param) for group in self.param_groups for param in group["params"]}
            for param in [param for param in self._emas if id(param) not in there]:
                del self._emas[param]

    def _skip(self) -> None:
        """A step that changes nothing."""
        one_pass = self._one_pass
        if one_pass is None:
            return
        one_pass.n_skipped += 1
        if one_pass.zero_grads:
            torch.optim.Optimizer.zero_grad(self, set_to_none=False)
