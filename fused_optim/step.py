"""One step in its order: gather (C++, validates everything), decide, commit (C++, cannot fail)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fused_optim import averages, backends, clipping, fallback, options, outputs
from fused_optim.tracing import WATCHED, n_dispatch_modes

if TYPE_CHECKING:
    from fused_optim.optimizer import FusedOptimizer

# Tensors stepped on the CPU, tensors stepped on devices, and (group, index, reason) of each fallback.
Outcome = tuple[int, int, list[tuple[int, int, str]] | None]

Groups = list[dict[str, Any]]


class Scaling:
    """What a GradScaler asks of the step under way.

    Attributes:
        grad_scale: the grads are divided by it; None: they are not.
        found_inf: not 0 if the step is skipped; None: it is not.
        on_device: whether a device alone knows the grad scale.
        skip_on_device: whether a device alone knows if the step is skipped.
    """

    def __init__(self, grad_scale: Tensor | None, found_inf: Any) -> None:
        self.grad_scale = grad_scale
        # GradScaler's sum over no grads is the number 0.
        self.found_inf: Tensor | None = found_inf if isinstance(found_inf, Tensor) else None
        self.on_device = grad_scale is not None and not backends.host_knows(grad_scale)
        self.skip_on_device = self.found_inf is not None and not backends.host_knows(self.found_inf)

    def host_skips(self) -> bool:
        """Whether the host knows that the step is skipped."""
        return (
            self.found_inf is not None and not self.skip_on_device and bool(self.found_inf.item())
        )

    def skips(self) -> bool:
        """Whether the step is skipped. Waits for the device."""
        return self.found_inf is not None and bool(self.found_inf.item())

    def number(self) -> float:
        """The grad scale, 0: none. Waits for the device."""
        return 0.0 if self.grad_scale is None else float(self.grad_scale.item())


_NO_SCALING = Scaling(None, None)


def step_groups(optimizer: FusedOptimizer, groups: Groups, keeper: Any) -> Outcome | None:
    """Step the params of these groups; None if the host knows at once that GradScaler skips that.

    Args:
        groups: the optimizer's, or copies with some of their params, whose ``_origin`` says which: the
            group's index, the params' indices, and the first one's number among all params.
        keeper: the optimizer, or a bucket of release_gradients: its attribute ``_plan`` keeps plan and
            launcher from one step of such groups to the next.
    """
    grad_scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    scaling = _NO_SCALING
    if grad_scale is not None or found_inf is not None:
        scaling = Scaling(grad_scale, found_inf)
    measures = clipping.begin(optimizer, scaling)
    if not measures and scaling.host_skips():
        return clipping.skip(optimizer)
    kernels = backends.cpu_kernels()
    if kernels is None or n_dispatch_modes():
        return _step_without_kernels(optimizer, groups, scaling, measures)
    if backends.forced() == "triton" and not backends.interpreted():
        fallback.refuse_cpu_params(groups)
    # Taken out for the time of the step: two threads never share a plan.
    plan, launcher = keeper.__dict__.pop("_plan", None) or (kernels.Plan(optimizer._rule), None)
    try:
        device_types = backends.device_types()
        if device_types:
            launcher = launcher or _new_launcher(optimizer)
        bits = _bits(kernels, optimizer, scaling, measures, launcher if device_types else None)
        todo = plan.gather(optimizer, groups, launcher, device_types, bits)
        if todo == 0:  # nothing to decide
            outcome = plan.commit(1.0, 0.0, backends.num_threads())
        else:
            outcome = _decide_and_commit(optimizer, scaling, kernels, plan, launcher, todo)
        if outcome is None:
            clipping.skip(optimizer)
            return 0, 0, None
        if optimizer._averages:
            averages.forget_removed_params(optimizer)
        return outcome
    except BaseException:
        plan = kernels.Plan(optimizer._rule)  # the other one remembers a step that did not finish
        raise
    finally:
        if launcher is not None and "_plan" in keeper.__dict__:  # by a step in another thread
            launcher.adopt(keeper._plan[1])
        keeper._plan = plan, launcher


def _step_without_kernels(
    optimizer: FusedOptimizer, groups: Groups, scaling: Scaling, measures: bool
) -> Outcome | None:
    """Have torch.optim's code step all; None if found_inf skips that."""
    if not measures and scaling.skips():
        return clipping.skip(optimizer)
    reason = "no kernels in use" if backends.cpu_kernels() is None else WATCHED
    fallbacks = [
        (g, i, reason) for param, g, i in fallback.positions(groups) if param.grad is not None
    ]
    for group in groups:
        options.check_averaging(group)
    clip = clipping.decide(optimizer, scaling, None, None, waits=True) if measures else 1.0
    if clip is None:
        clipping.skip(optimizer)
        return 0, 0, None
    copied = outputs.of_stepped(optimizer) if optimizer._outputs else ()
    if fallbacks:
        fallback.write(fallback.step(optimizer, fallbacks, clip))
    averages.move_params(optimizer, groups, set())
    averages.forget_removed_params(optimizer)
    outputs.copy(copied)
    return 0, 0, fallbacks


def _decide_and_commit(
    optimizer: FusedOptimizer, scaling: Scaling, kernels: Any, plan: Any, launcher: Any, todo: int
) -> Outcome | None:
    """None if the host knows that the step is skipped; nothing is written then."""
    if todo & kernels.DEVICES and not _ready(plan, launcher, todo & kernels.MEASURES):
        todo = todo & ~kernels.DEVICES | kernels.FALLBACKS | kernels.AVERAGES
    on_cpu, falls_back = plan.n_on_cpu() > 0, bool(todo & kernels.FALLBACKS)
    host_counts = bool(todo & kernels.SKIP_ON_DEVICE) and plan.host_counts()
    clip: float | Tensor | None = 1.0
    if todo & kernels.MEASURES:
        waits = on_cpu or host_counts or bool(falls_back and todo & kernels.SKIP_ON_DEVICE)
        on_devices = launcher if todo & kernels.DEVICES else None
        clip = clipping.decide(optimizer, scaling, plan, on_devices, waits)
    elif (on_cpu or falls_back or host_counts) and scaling.skips():
        clip = None
    if clip is None:
        plan.release()
        return None
    not_averaged = plan.averages_left() if todo & kernels.AVERAGES else []
    if optimizer._outputs:
        outputs.check_left(not_averaged)
    # A clip that the device alone knows leaves no tensor to the CPU's kernels.
    clip_on_cpu = 1.0 if isinstance(clip, Tensor) else clip
    grad_scale, n_threads = scaling.number() if on_cpu else 0.0, backends.num_threads()
    # Ctrl-C interrupts calls of Python's: from the first write on, there are as few as can be.
    left = fallback.step(optimizer, plan.fallbacks(), clip) if falls_back else []
    if todo & kernels.DEVICES:
        plan.begin_commit()
        try:
            launcher.launch()
        finally:  # an interrupted launch does not leave the rest half done
            outcome = plan.commit(clip_on_cpu, grad_scale, n_threads)
    else:
        outcome = plan.commit(clip_on_cpu, grad_scale, n_threads)
    fallback.write(left)
    if not_averaged:
        averages.move(not_averaged, launcher and launcher.found_inf)
    return outcome


def _bits(
    kernels: Any, optimizer: FusedOptimizer, scaling: Scaling, measures: bool, launcher: Any
) -> int:
    """What gather() has to know about the step; begins a step of the launcher."""
    bits = 0
    options = optimizer._clipping
    if scaling is not _NO_SCALING:
        if scaling.on_device or scaling.number() != 0:
            bits |= kernels.SCALES
        if scaling.skip_on_device:
            bits |= kernels.SKIP_ON_DEVICE
    if measures:
        bits |= kernels.MEASURES
    if options is not None:
        if options.write_clipped_grads:
            bits |= kernels.WRITES_CLIPPED
        if options.zero_grads:
            bits |= kernels.ZEROES
    if launcher is not None:
        launcher.begin(scaling.grad_scale, scaling.found_inf, options)
        if measures and options is not None and options.skips:
            bits |= kernels.SKIP_ON_DEVICE
    return bits


def _new_launcher(optimizer: FusedOptimizer) -> Any:
    launcher = backends.launcher(optimizer._rule)
    launcher.adopt(optimizer.__dict__.get("_plan", (None, None))[1])
    return launcher


def _ready(plan: Any, launcher: Any, measures: int) -> bool:
    """Have the devices' kernels compiled and their tables there. If not, the tensors are fallbacks now."""
    for task, originals, written in plan.tasks_to_stage():
        plan.stage(task, launcher.stage(originals, written))
    grads = plan.grad_batches() if measures else []
    failure = launcher.ready(plan.batches(), grads, plan.grad_write())
    if failure is not None:
        plan.drop_devices(failure)
    return failure is None
