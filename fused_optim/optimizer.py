"""The class that all optimizers share: constructor's options, step(), states, checkpoints."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from fused_optim import averages, backends, checkpoint, clipping, options, sharding, storage, unsure
from fused_optim import outputs as outputs_of
from fused_optim.options import GroupOption, KernelOptions
from fused_optim.step import step_groups
from fused_optim.tracing import check_graph_capture, left_to_the_interpreter
from fused_optim.wrappers import unwrapped

if TYPE_CHECKING:
    from fused_optim.explain import Explanation

try:
    from torch._C._profiler import _RecordFunctionFast
except ImportError:
    _RecordFunctionFast = None


@dataclass(frozen=True)
class Fallback:
    """One tensor that torch.optim's own code stepped: ``param_groups[group]["params"][index]``."""

    group: int
    index: int
    reason: str


@dataclass(frozen=True)
class StepReport:
    """Counts and fallbacks of the latest step.

    Attributes:
        tensors: backend ("cpu", "triton" or "stock") -> number of tensors that it stepped, if any.
        fallbacks: the tensors that no kernel could serve, with the reason.
    """

    tensors: dict[str, int]
    fallbacks: list[Fallback]


def _renamed(function: Any, qualname: str) -> Any:
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    functools.update_wrapper(copy, function)
    copy.__qualname__ = qualname
    return copy


class FusedOptimizer(torch.optim.Optimizer):
    """Steps tensors on kernels where they can, and the rest by the stock class's own code.

    A subclass also inherits from the torch.optim class of the same name, which gives it constructor,
    validation, state schema and the stock step, and names its rule.

    ``max_grad_norm, write_clipped_grads, skip_nonfinite`` and ``zero_grads`` are attributes that may be
    changed between two steps. They are the program's, not the checkpoint's: loading one leaves them alone.
    """

    _rule: ClassVar[str]  # key of _C.rules()
    _stock: ClassVar[type[torch.optim.Optimizer]]
    _sparse_refusal: ClassVar[str | None] = None  # stock's error text if it takes no sparse grads

    _clipping: clipping.Clipping | None = None  # there once an option of it is in use
    _group_options: dict[str, Any] | None = None  # what a new param group gets
    _averages: averages.Averages  # param -> entry
    _outputs: dict[Tensor, Tensor] | None = None  # param -> what gets its new values
    _unsure: unsure.Unsure
    _found_inf_to_report: Tensor  # there while a GradScaler waits for it
    _why_no_step: str | None = None  # the params do not hold what a step moves
    _has_some_params = False  # of a model, the rest being another process's

    max_grad_norm = clipping.ClippingOption()
    write_clipped_grads = clipping.ClippingOption()
    skip_nonfinite = clipping.ClippingOption()
    zero_grads = clipping.ClippingOption()

    ema_decay = GroupOption()
    ema_warmup = GroupOption()
    ema_dtype = GroupOption()
    state_dtype = GroupOption()
    master = GroupOption()
    rounding_seed = GroupOption()

    @left_to_the_interpreter
    def _take_options(self, given: KernelOptions) -> None:
        """Check and keep these arguments of the constructor; before torch.optim's begins."""
        options.check_all(given, type(self))
        self._clipping = None
        self._group_options = options.of_new_groups(given)
        for key in options.OF_OPTIMIZER:
            if key in given:
                setattr(self, key, given[key])
        if sharding.is_distributed() and sharding.is_built_for_some_params():
            self._has_some_params = True
            if self.max_grad_norm is not None or self.skip_nonfinite:
                sharding.refuse_some_params()
        self._support_amp_scaling()

    def _set_up(self) -> None:
        self.__dict__.setdefault("_averages", {})
        self.__dict__.setdefault("_unsure", unsure.Unsure())

    def _support_amp_scaling(self) -> None:
        """Have GradScaler leave unscaling and skipping to step() if an option of one pass is in use."""
        averages_params = any(key in options.AVERAGING for key in self._group_options or ())
        if self._clipping is not None or averages_params:
            self._step_supports_amp_scaling = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        constructor = vars(cls).get("__init__")
        if isinstance(constructor, FunctionType):
            left_to_the_interpreter(constructor)  # torch.compile of torch 2.11 fails in it

    @property
    def last_step(self) -> StepReport | None:
        """Report of the latest :meth:`step`; None before the first."""
        outcome = unwrapped(self).__dict__.get("_last_step")
        if outcome is None:
            return None
        n_cpu, n_triton, fallbacks = outcome[0], outcome[1], outcome[2] or []
        counts = {"cpu": n_cpu, "triton": n_triton, "stock": len(fallbacks)}
        return StepReport(
            {backend: count for backend, count in counts.items() if count},
            [Fallback(*fallback) for fallback in fallbacks],
        )

    @left_to_the_interpreter
    def explain(self, *, measure: bool = False) -> Explanation:
        """Tell what the next :meth:`step` would do: a table as a string, or its ``rows``.

        Changes nothing, makes no states, and works before the first step. A param that has no grad counts
        as if it had one like itself; one with ``requires_grad=False`` counts as not stepped.

        Args:
            measure: predict the time from the memory bandwidth, which is measured for a few tenths of a
                second, and 256 or 512 MiB, at the first time in a process.

        Raises:
            RuntimeError, ValueError: as the step would.
        """
        from fused_optim.explain import explain  # which a step does not need

        return explain(unwrapped(self), measure=measure)

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Stock's wrapper of step(), for the profiler and the hooks, entered only if there are any.

        Its profiler label costs 4 us even without a profiler: more than a small model's step.
        """
        with_hooks = torch.optim.Optimizer.profile_hook_step(func)
        if _RecordFunctionFast is None:
            return with_hooks
        label = _RecordFunctionFast

        @functools.wraps(func)
        def wrapper(self: FusedOptimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                _profiler_enabled()
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
            ):
                return with_hooks(self, *args, **kwargs)
            with label(
                f"Optimizer.step#{type(self).__name__}.step"
            ):  # for observers of other kinds
                return func(self, *args, **kwargs)

        return left_to_the_interpreter(wrapper)

    @left_to_the_interpreter
    def _patch_step_function(self) -> None:
        """Wrap step() as torch.optim does when the first optimizer of a class is made.

        Rename it first: Python's errors then name it as they name stock's.
        """
        cls = type(self)
        if cls.step is FusedOptimizer.step:
            cls.step = _renamed(cls.step, cls._stock.step.__qualname__)  # type: ignore[method-assign]
        super()._patch_step_function()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: a grad or state does not fit its param (shape, device, dtype), or its
                memory was freed. Nothing has been written then.
            ValueError: a param group's ema_decay is not in [0, 1). Nothing has been written then.
            TypeError, RuntimeError, ...: torch.optim's own, of an option that it does not take. Nothing has
                been written then.
        """
        if self._why_no_step is not None:
            raise RuntimeError(f"step() {self._why_no_step}")
        check_graph_capture(self)
        released = self.__dict__.get("_released")  # by release_gradients
        if released is not None:
            released.refuse_scaling(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if released is None:
            outcome = step_groups(self, self.param_groups, self)
        else:
            # The average of a param that was stepped in the backward is made already.
            groups = [{**group, "ema_decay": None} for group in self.param_groups]
            outcome = step_groups(self, groups, self)
            averages.move_params(self, self.param_groups, released.stepped())
            outcome = released.end_iteration(outcome)
        if outcome is not None:
            self._last_step = outcome
        return loss

    left_to_the_interpreter(step)

    @left_to_the_interpreter
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's."""
        super().zero_grad(set_to_none)
        released = unwrapped(self).__dict__.get("_released")
        if released is not None:
            released.accumulate_anew()

    def _create_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The first states of one param: stock's own code makes them, beside self.state."""
        beside = SimpleNamespace(state=defaultdict(dict), defaults=self.defaults)
        init_group = self._stock._init_group  # type: ignore[attr-defined]
        n_lists = len(inspect.signature(init_group).parameters) - 2
        # On a GPU, fused=True has step live there.
        fused = bool(group.get("fused")) and param.device.type != "cpu"
        # Else a default device would be where step lives: Adam's before torch 2.13, RMSprop's in all.
        with torch.no_grad(), torch.device("cpu"):
            init_group(
                beside,
                {**group, "params": [param], "foreach": False, "fused": fused},
                *([] for _ in range(n_lists)),
            )
        return beside.state[param]

    def _create_states(
        self, param: Tensor, group: dict[str, Any], may_be_skipped: bool = False
    ) -> dict[str, Any]:
        """Make the first states of one param, in the formats of its group, for gather().

        Args:
            may_be_skipped: a device may skip the step that they are for, without the host knowing.
        """
        if may_be_skipped and not self.state.get(param):
            self._unsure.params.add(id(param))
        if not storage.applies(param, group):
            return self._create_state(param, group)
        # Made on meta: torch.optim's own take no memory, and no step on a device is waited for.
        created = self._create_state(storage.on_meta(param), {**group, "fused": False})
        first = self._first_values(group)
        for key in created.keys() & self._scalars():
            created[key] = storage.new_scalar(created[key], first[key], param, group)
        states = {**self.state.get(param, {}), **created}
        states = self._convert_first(param, group, states, first)
        return {key: value for key, value in states.items() if value is not None}

    def _first_values(self, group: dict[str, Any]) -> dict[str, float]:
        """The value that each state begins with, all elements alike."""
        like = torch.zeros((), dtype=torch.float32, device="cpu")
        like.grad = torch.zeros_like(like)
        made = self._create_state(like, {**group, "fused": False, "capturable": False})
        return {key: float(value) for key, value in made.items()}

    def _convert_first(
        self, param: Tensor, group: dict[str, Any], states: dict[str, Any], first: dict[str, float]
    ) -> dict[str, Any]:
        """Make the first states in the group's formats; only the layout of torch.optim's counts.

        Args:
            first: from `_first_values`.
        """
        rule = self._description()
        converted = storage.encode_states(param, group, states, rule, None)
        if not any(first.get(key) for key in rule["states"]):
            return converted
        for key, kind in zip(rule["states"], rule["kinds"]):
            if not first.get(key):
                continue
            if storage.of_state(param, group, kind).storage == "plain":
                converted[key].fill_(first[key])
            else:
                converted[key] = torch.full_like(converted[key], first[key], dtype=torch.float32)
                converted.pop(f"{key}_scale", None)
        random_key = (group.get("rounding_seed", 0), storage.CONVERTING, 0)
        return storage.encode_states(param, group, converted, rule, random_key)

    def _convert_states(
        self, param: Tensor, group: dict[str, Any], states: dict[str, Any]
    ) -> dict[str, Any]:
        """Convert states to the formats of the group; None: there is no such state any more."""
        step = states.get("step")
        key = (group.get("rounding_seed", 0), storage.CONVERTING, 0 if step is None else int(step))
        return storage.encode_states(param, group, states, self._description(), key)

    def _create_average(
        self, param: Tensor, group: dict[str, Any], entry: averages.Entry | None
    ) -> averages.Entry:
        return averages.create(param, group, entry)

    def _check_options(self, group: dict[str, Any], index: int) -> None:
        """Raise the error for a group's options, which gather() has found to be wrong."""
        where = f" in param group {index}"
        options.check_averaging(group, where)
        options.check_formats(group, where)

    def set_outputs(self, outputs: Mapping[Tensor, Tensor] | None) -> None:
        """Have each step leave the params' new values in other tensors too, in its own pass over them.

        So float32 params here and a bfloat16 model elsewhere need no copies beside the step. The tensors are
        filled at once. A step that is skipped, or has no grad for the param, leaves them alone; so does
        whatever else changes params, ``load_state_dict`` say. They are no part of the state.

        Args:
            outputs: param -> tensor of its shape and a floating-point dtype, on any device. They take the
                place of what was set before. None, or nothing: no outputs.

        Raises:
            TypeError: this is no dict, or an output no tensor.
            ValueError: a key is no param of this optimizer; an output has another shape, kind of dtype or
                sharding, or addresses between those of a param or another output. Nothing was set.
        """
        outputs_of.register(unwrapped(self), outputs)

    def _description(self) -> dict[str, Any]:
        """The rule's names, as csrc/rules.h has them."""
        codec = backends.codec()
        assert codec is not None
        return codec.rules()[self._rule]

    def _scalars(self) -> set[str]:
        """The keys of the states that are one number: `step`, and others of the rule."""
        codec = backends.codec()
        return {"step"} if codec is None else {"step", *codec.rules()[self._rule]["scalars"]}

    def _refuse_sparse(self, group: dict[str, Any]) -> str | None:
        """Stock's error text if this group takes no sparse grads; stock raises it half-way."""
        return self._sparse_refusal

    @left_to_the_interpreter
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; options of averaging and of formats may differ by group."""
        self._set_up()  # constructors pass here, whoever wrote them
        if isinstance(param_group, dict):
            options.refuse_in_group(param_group)
            for key, value in (unwrapped(self)._group_options or {}).items():
                param_group.setdefault(key, value)
            options.check({"differentiable": self.defaults.get("differentiable"), **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "state_dtype" in group:
            group["state_dtype"] = options.state_dtype_of(group)
        ignoring = [g for g in self.param_groups if storage.ignores_master(g["params"], g)]
        if ignoring == [group]:  # else it is said already
            warnings.warn(
                f"master={group['master']!r} does nothing for float32 params: "
                "it is for bfloat16 and float16",
                UserWarning,
                stacklevel=2,
            )

    @property
    def grad_norm(self) -> Tensor | None:
        """2-norm of all grads (unscaled, not clipped) in the latest step that measured it.

        A float64 tensor without dimensions, on the device that all grads lie on, else on the CPU; None
        before the first such step. Steps measure with max_grad_norm, or with skip_nonfinite unless
        GradScaler has looked for Inf itself; steps that are then skipped measure too.

        Nothing waits for a device that all grads lie on. If they lie on several, or torch.optim's own
        code steps some of them and the step may be skipped, step() waits.
        """
        return (unwrapped(self)._clipping or clipping.OFF).grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """The number of skipped steps, int64 without dimensions.

        By skip_nonfinite; by GradScaler if ``max_grad_norm``, ``skip_nonfinite`` or ``zero_grads`` is in use.
        """
        return (unwrapped(self)._clipping or clipping.OFF).skipped_steps

    def ema_params(self) -> list[Tensor]:
        """The averages of the params in groups with an ema_decay, in the params' order.

        They are the optimizer's own, of the params' shapes; before the first step, copies of the params.

        Raises:
            RuntimeError: no param group has an ema_decay.
        """
        return averages.of_params(unwrapped(self))

    @contextmanager
    def swapped_ema(self) -> Iterator[None]:
        """Within the context, params hold their averages: ``with opt.swapped_ema(): evaluate()``.

        The params' own values are kept in copies meanwhile and come back at the end, whatever happens.

        Raises:
            RuntimeError: no param group has an ema_decay, or the params are swapped already; and, within
                the context, from step().
        """
        with averages.swapped(unwrapped(self)):
            yield

    @left_to_the_interpreter
    def master_params(self) -> list[Tensor]:
        """The params in float32, in order: with the bits that ``master="split8"`` or ``"split16"`` keeps.

        New tensors, of the params' shapes and on their devices, for saving float32 weights. Params of other
        dtypes than bfloat16 and float16 are copied as they are.
        """
        return checkpoint.master_params(self)

    def load_master_params(self, values: Sequence[Tensor]) -> None:
        """Set the params, and the bits beside them, from what :meth:`master_params` gave.

        Args:
            values: one tensor for each param, in order and of its shape.

        Raises:
            ValueError: another number of tensors, or another shape; nothing was written.
        """
        checkpoint.load_master_params(self, values)

    @left_to_the_interpreter
    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's, with states as they are stored; averages, if there are any, under the key "ema".

        torch.optim can load it, but refuses 8-bit states, which it would take for numbers; it loads what
        :meth:`state_dict_for_stock` gives.

        8-bit states of sharded params (DTensors, FullyShardedDataParallel's), and all that
        torch.distributed.checkpoint asks for, are float32: codes of 64 elements mean nothing to a process
        that holds other ones. Loading finds the same codes again where the groups are the same.
        """
        optimizer = unwrapped(self)
        return checkpoint.save(optimizer, super(FusedOptimizer, optimizer).state_dict)

    @left_to_the_interpreter
    def state_dict_for_stock(self) -> dict[str, Any]:
        """A state_dict that torch.optim's class loads: states in float32, without what belongs to formats."""
        return checkpoint.save_for_stock(self)

    @left_to_the_interpreter
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's; states in any format, torch.optim's too, for the formats in use.

        Options of averaging and of formats that the saved groups lack, as torch.optim's do, stay what they
        are; those that they have come with them. States that are saved in other formats are converted.
        Without averages in the state_dict, averaging begins anew.

        Raises:
            ValueError: as torch.optim's; or the saved states contradict themselves, or an average has
                another shape than its param. Nothing was loaded.
        """
        optimizer = unwrapped(self)
        checkpoint.load(optimizer, state_dict, super(FusedOptimizer, optimizer).load_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        with unsure.only_stepped(self):
            kept = super().__getstate__()
        kept |= {"_averages": self._averages, "_group_options": self._group_options}
        if self._clipping is not None:
            kept["_clipping"] = self._clipping.__dict__.copy()
        return kept

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        state = dict(state)
        saved_clipping = state.pop("_clipping", None)
        self._set_up()
        super().__setstate__(state)
        if saved_clipping is not None:
            self._clipping = clipping.Clipping()
            self._clipping.__dict__.update(saved_clipping)
        # Stock loses this when pickled. The constructor's arguments decide, not a group's flag: that
        # may have arrived with a checkpoint.
        if "_step_supports_amp_scaling" not in self.__dict__:
            self._support_amp_scaling()
            if self.defaults.get("fused"):
                self._step_supports_amp_scaling = True
