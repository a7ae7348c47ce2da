"""FusedOptimizer owns step(): closure, kernels, stock for what no kernel serves."""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch._C._autograd import _profiler_enabled
from torch.optim.optimizer import (
    _device_dtype_check_for_fused,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from fused_optim import backends, ema, formats, grads, sharding
from fused_optim.packed import PackedOptimizer
from fused_optim.tracing import WATCHED, left_to_the_interpreter, n_dispatch_modes
from fused_optim.wrappers import unwrapped

if TYPE_CHECKING:
    from fused_optim.explain import Explanation

try:
    from torch._C._profiler import _RecordFunctionFast
except ImportError:
    _RecordFunctionFast = None


# Tensors stepped on the CPU, tensors stepped on devices, and (group, index, reason) of each fallback.
Outcome = tuple[int, int, list[tuple[int, int, str]] | None]


@dataclass(frozen=True)
class Fallback:
    """One tensor that torch.optim's own code stepped: ``param_groups[group]["params"][index]``."""

    group: int
    index: int
    reason: str


@dataclass(frozen=True)
class StepReport:
    """What the latest step did.

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


class FusedOptimizer(PackedOptimizer):
    """Steps on kernels what they can serve, and the rest with the stock class's own code.

    A subclass also inherits from the torch.optim class of the same name, which gives it constructor,
    validation, state schema and the stock step, and names its rule.
    """

    _stock: ClassVar[type[torch.optim.Optimizer]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        constructor = vars(cls).get("__init__")
        if isinstance(constructor, FunctionType):
            left_to_the_interpreter(constructor)  # torch.compile of torch 2.11 fails in it

    @property
    def last_step(self) -> StepReport | None:
        """What the latest :meth:`step` did; None before the first."""
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
        """What the next :meth:`step` would do: its string is a table, and its ``rows`` are what is in it.

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

        Its profiler label costs 4 us even while nobody listens: more than a small model's step.
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
        """As torch.optim's, which wraps step() when the first optimizer of a class is made.

        It wraps a step() that is called what stock's is: Python's errors name it.
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
        if self._is_swapped:
            raise RuntimeError("step() within swapped_ema(): the params hold their averages")
        if torch.cuda.is_initialized() and "capturable" in self.defaults:
            self._check_graph_capture()
        released = self.__dict__.get("_released")  # by release_gradients
        if released is not None:
            released.refuse_scaling(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if released is None:
            outcome = self._step_groups(self.param_groups, self, self._step_with_stock)
        else:
            # The average of a param that was stepped in the backward is made already.
            groups = [{**group, "ema_decay": None} for group in self.param_groups]
            outcome = self._step_groups(groups, self, self._step_with_stock)
            self._average(self.param_groups, released.stepped())
            outcome = released.end_iteration(outcome)
        if outcome is not None:
            self._last_step = outcome
        return loss

    left_to_the_interpreter(step)

    def _step_groups(
        self, groups: list[dict[str, Any]], keeper: Any, step_with_stock: Callable[..., None]
    ) -> Outcome | None:
        """Step these params; None if found_inf skips that.

        Args:
            groups: all of param_groups, or copies of some with some of their params.
            keeper: its attribute ``_plan`` keeps the plan from one step with such groups to the next.
            step_with_stock: (list of (position in groups, index in params, reason), launcher) -> None.
        """
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # GradScaler's sum over no grads: the number 0
            found_inf = None
        skip_on_device = found_inf is not None and not backends.host_knows(found_inf)
        measured = self._begin_one_pass(found_inf)
        if measured is None and found_inf is not None and not skip_on_device and found_inf.item():
            self._skip()
            return None
        one_pass = self._one_pass
        kernels = backends.cpu_kernels()
        if kernels is None or n_dispatch_modes():
            if measured is None and found_inf is not None and found_inf.item():
                self._skip()
                return None
            reason = "no kernels in use" if kernels is None else WATCHED
            launcher = keeper.__dict__.get("_plan", (None, None))[1]
            return self._step_all_with_stock(groups, step_with_stock, measured, reason, launcher)
        if backends.forced() == "triton" and not backends.interpreted():
            self._refuse_cpu_params(groups)
        # Taken out for the time of the step: two threads never share a plan.
        plan, launcher = keeper.__dict__.pop("_plan", None) or (kernels.Plan(self._rule), None)
        try:
            device_types = backends.device_types()
            if device_types:
                if launcher is None:
                    launcher = backends.launcher(self._rule)
                    launcher.adopt(self.__dict__.get("_plan", (None, None))[1])
                launcher.begin(grad_scale, found_inf, one_pass)
                if measured is not None and one_pass is not None and one_pass.skips:
                    skip_on_device = True
            scale_on_device = grad_scale is not None and not backends.host_knows(grad_scale)
            outcome = plan.step(
                groups,
                self.state,
                self._create_unsure if skip_on_device else self._create_packed,
                self._convert_state,
                sharding.place_of,
                lambda fallbacks: step_with_stock(fallbacks, launcher),
                launcher,
                device_types,
                torch.get_num_threads(),
                0.0 if grad_scale is None or scale_on_device else grad_scale.item(),
                scale_on_device,
                skip_on_device,
                lambda: self._resolve_scaling(measured is not None),
                measured,
                one_pass is not None and one_pass.write_clipped_grads,
                one_pass is not None and one_pass.zero_grads,
                self._all_emas(),
                ema.create,
            )
            if outcome[2] is not None:
                grads.write(self.__dict__.pop("_grads_left", []))
            if outcome[3] is not None:
                ema.average(outcome[3], launcher and launcher.found_inf)
            if self._emas:
                self._forget_removed_params()
        except BaseException:
            # One that was interrupted trusts what it has not finished.
            plan = kernels.Plan(self._rule)
            raise
        finally:
            if launcher is not None and "_plan" in keeper.__dict__:  # by a step in another thread
                launcher.adopt(keeper._plan[1])
            keeper._plan = plan, launcher
        return outcome[:3]

    @left_to_the_interpreter
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's."""
        super().zero_grad(set_to_none)
        released = unwrapped(self).__dict__.get("_released")
        if released is not None:
            released.accumulate_anew()

    def _check_graph_capture(self) -> None:
        """Stock's error where a CUDA graph would capture what cannot be replayed; Adam and RMSprop."""
        name = "_accelerator_graph_capture_health_check"  # before torch 2.12: _cuda_...
        getattr(self, name if hasattr(self, name) else name.replace("accelerator", "cuda"))()

    def _refuse_cpu_params(self, groups: list[dict[str, Any]]) -> None:
        for g, group in enumerate(groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None and param.device.type == "cpu":
                    raise RuntimeError(
                        f"FUSED_OPTIM_BACKEND=triton, but param {i} of group {g} is on the CPU, "
                        "which Triton serves only with TRITON_INTERPRET=1"
                    )

    def _resolve_scaling(self, measures: bool) -> float | None:
        """The grad scale (0: none), or None if the step is skipped. Waits for the device.

        Args:
            measures: whether it is skipped when the grads are measured.
        """
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if not measures and isinstance(found_inf, Tensor) and found_inf.item():
            self._skip()
            return None
        return 0.0 if grad_scale is None else float(grad_scale.item())

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

    def _refuse_sparse(self, group: dict[str, Any]) -> str | None:
        """Stock's error text if this group takes no sparse grads; stock raises it half-way."""
        return None

    def _step_all_with_stock(
        self,
        groups: list[dict[str, Any]],
        step_with_stock: Callable[..., None],
        measured: Callable[..., float | None] | None,
        reason: str,
        launcher: Any,
    ) -> Outcome:
        fallbacks = [
            (g, i, reason)
            for g, group in enumerate(groups)
            for i, param in enumerate(group["params"])
            if param.grad is not None
        ]
        for group in groups:
            ema.check(group)
        if measured is not None and measured(0.0, False, fallbacks, None, True) is None:
            return 0, 0, None
        if fallbacks:
            step_with_stock(fallbacks, launcher)
            grads.write(self.__dict__.pop("_grads_left", []))
        self._average(groups, set())
        return 0, 0, fallbacks

    def _rehearse(self, step: Callable[..., Any], g: int, group: dict[str, Any]) -> None:
        """Run the stock step on copies: with odd options it may raise when it has written half of them."""
        groups, state = self.param_groups, self.state
        copies = {p: nn.Parameter(p.detach().clone(), p.requires_grad) for p in group["params"]}
        for param, copy in copies.items():
            grads.put(copy, param.grad)
        self.param_groups = [{**group, "params": list(copies.values())}]
        self.state = defaultdict(dict)
        for param, copy in copies.items():
            self.state[copy] = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in state.get(param, {}).items()
            }
        try:
            step(self)
        except Exception as error:
            keys = [key.partition(".")[0] for key in self._description()["options"]]
            options = ", ".join(f"{k}={group.get(k)!r}" for k in dict.fromkeys([*keys, "maximize"]))
            raise type(error)(f"param group {g} ({options}): {error}") from error
        finally:
            self.param_groups, self.state = groups, state

    def _step_with_stock(self, fallbacks: list[tuple[int, int, str]], launcher: Any = None) -> None:
        """Run the stock, non-fused step for these (group, index, reason) alone."""
        if backends.forced() in ("cpu", "triton"):
            g, i, reason = fallbacks[0]
            raise RuntimeError(
                f"FUSED_OPTIM_BACKEND={backends.forced()}, but param {i} of group {g} needs stock: "
                f"{reason}"
            )
        chosen: dict[int, list[Tensor]] = {}
        numbers: dict[int, list[int]] = {}
        for g, i, _ in fallbacks:
            group = self.param_groups[g]
            param = group["params"][i]
            if param.device.type != "cpu":
                if param.is_meta and group.get("fused"):
                    _device_dtype_check_for_fused(param)  # stock's error
                backends.warn_unless_served(param.device)
            refusal = self._refuse_sparse(group) if param.grad.is_sparse else None
            if refusal is not None:
                raise RuntimeError(refusal)
            chosen.setdefault(g, []).append(param)
            numbers.setdefault(g, []).append(formats.first_number(self.param_groups, g) + i)
        if len(fallbacks) > 1 and self._share_memory_in_other_formats(fallbacks):
            left = []
            for fallback in fallbacks:  # each sees what the one before it has written
                self._step_with_stock([fallback], launcher)
                left += self._grads_left
            self._grads_left = left
            return
        grad_scale = getattr(self, "grad_scale", None)
        whole = self.param_groups
        scaling = {
            k: self.__dict__.pop(k) for k in ("grad_scale", "found_inf") if k in self.__dict__
        }
        self.param_groups = [
            {**whole[g], "params": params, "foreach": False, "fused": False}
            for g, params in chosen.items()
        ]
        one_pass = self._one_pass
        stepped = [param for params in chosen.values() for param in params]
        try:
            step = self._stock.step
            # Stock's step may be wrapped by the profiler hook, which would fire all hooks again.
            if getattr(step, "hooked", False):
                step = step.__wrapped__  # type: ignore[attr-defined]
            with (
                grads.stand_ins(
                    stepped,
                    grad_scale,
                    1.0 if one_pass is None else one_pass.clip,
                    writes_clipped=one_pass is not None and one_pass.write_clipped_grads,
                    zeroes=one_pass is not None and one_pass.zero_grads,
                ) as left,
                self._in_float32(self.param_groups, list(numbers.values())),
            ):
                kernels = backends.codec()
                odd = kernels and {g for g, _, why in fallbacks if why == kernels.ODD_OPTIONS}
                for g, group in zip(chosen, self.param_groups):
                    if odd and g in odd:
                        self._rehearse(step, g, group)
                step(self)
            self._grads_left = left
        finally:
            self.param_groups = whole
            self.__dict__.update(scaling)
