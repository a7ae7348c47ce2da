"""release_gradients(): each param is stepped, and its grad freed, inside the backward."""

from __future__ import annotations

import sys
import threading
import weakref

import torch
from torch import Tensor

from fused_optim.buckets import Bucket
from fused_optim.optimizer import FusedOptimizer
from fused_optim.step import Outcome
from fused_optim.tracing import left_to_the_interpreter
from fused_optim.wrappers import unwrapped

# Backward and step with AdamW in float32 on 2 threads of an AMD EPYC, beside the ordinary loop: 2,000 tensors
# of 256 elements (45 ms) take 98 ms more with 2,000 calls, 16 ms more with 32 and 15 ms with one, for the
# hooks; 500 tensors of 16,384 (18 ms) 20, 8, 3 and 5 ms more with 2^14, 2^16, 2^20 and 2^22; GPT-2 small
# (197 ms) 50, 58 and 53 ms less with 2^14, 2^20 and 2^24. In float32, 2^20 keeps 4 MiB of grads.
BUCKET_NUMEL = 2**20


def release_gradients(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accumulation_steps: int = 1,
    bucket_numel: int = BUCKET_NUMEL,
) -> ReleaseHandle:
    """Step each param inside the backward, as soon as its grad is complete, and free the grad.

    All grads then never exist at once. The training loop stays as it is: ``loss.backward()``,
    ``optimizer.step()``, ``optimizer.zero_grad()``; ``step()`` now steps what still has a grad (params
    that did not require grad yet, or were added later), runs its hooks, and ends the iteration, of
    which ``optimizer.last_step`` then tells the whole. Params and states get the same bits as without.

    Args:
        model: has all params of the optimizer.
        optimizer: one of this package, whose groups have neither capturable nor differentiable. It is
            not kept alive.
        accumulation_steps: backwards for each ``step()``, >= 1 (default: 1). The last one steps and
            frees; the others accumulate.
        bucket_numel: a kernel is called when the complete grads have this many elements, >= 1, and at
            the end of the backward (default: 2^20).

    Returns:
        A handle whose ``remove()`` makes everything as before; also a context manager.

    Raises:
        ValueError: an argument outside its range, or an optimizer or model that cannot work so: one
            that needs all grads before the first write (max_grad_norm, skip_nonfinite) or after the
            last (zero_grads), that has a param which is not the model's or is there twice, or that
            already releases; a model in DistributedDataParallel, FSDP or of DTensors.
        RuntimeError: torch.distributed has more than one process, each of which would step on its own
            grads; a CUDA graph is captured; later, in a backward: it is one more than
            accumulation_steps since the last ``step()``; in ``step()``: a GradScaler's scale is set.

    Note:
        A backward that raises leaves the params stepped that it had stepped, and their grads freed; the
        others keep their grads, as always. The next backward counts from 1 again.

        Hooks on grads (``Tensor.register_hook``) and on params run as without. What ``step()``'s own
        pre-hooks or ``clip_grad_norm_`` between ``backward()`` and ``step()`` would do to grads comes too
        late. After ``zero_grad(set_to_none=False)`` freed grads are None, not zeros.

        A backward that needs a param's values beside its graph (of ``param.detach()``, or a second
        time with retain_graph) finds them changed: autograd raises its own error. In a reentrant
        torch.utils.checkpoint, a param must belong to one segment only.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = fused_optim.AdamW(model.parameters())
        >>> with fused_optim.release_gradients(model, optimizer):
        ...     model(torch.ones(3, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight.grad is None, sum(optimizer.last_step.tensors.values())
        (True, 2)
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise ValueError(
            f"release_gradients needs an optimizer of fused_optim, got {type(optimizer).__name__}"
        )
    optimizer = unwrapped(optimizer)
    if accumulation_steps < 1:
        raise ValueError(f"Invalid accumulation_steps: {accumulation_steps}, must be >= 1")
    if bucket_numel < 1:
        raise ValueError(f"Invalid bucket_numel: {bucket_numel}, must be >= 1")
    for reason in (_optimizer_refusal(optimizer), _model_refusal(model)):
        if reason is not None:
            raise ValueError(f"release_gradients cannot work: {reason}")
    _refuse_surroundings()
    _refuse_params(model, optimizer)
    return ReleaseHandle(optimizer, accumulation_steps, bucket_numel)


class ReleaseHandle:
    """Handle that :func:`release_gradients` returns.

    The optimizer owns it. It refers to the optimizer, and each param's hook to it, weakly: nothing here
    keeps a model alive.
    """

    def __init__(
        self, optimizer: FusedOptimizer, accumulation_steps: int, bucket_numel: int
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._accumulation_steps = accumulation_steps
        self._bucket_numel = bucket_numel
        # A model on several devices has a thread for each of them in the backward.
        self._lock = threading.RLock()
        self._positions: dict[int, tuple[int, int] | None] = {}  # id(param) -> group, index
        self._backwards: dict[int, weakref.ref[_Backward]] = {}  # those that have not ended
        self._failed = False  # a hook of ours raised
        self._overrun = False  # one backward too many; until step()
        self._counts: dict[int, int] = {}  # id(param) -> backwards in this iteration
        self._outcomes: list[Outcome] = []  # of this iteration
        # One for each kernel call of an iteration: they repeat, so plans find again what they know.
        self._buckets = [Bucket()]
        self._ordinal = 0
        self._hook = _Hook(self)
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._hook)
            for group in optimizer.param_groups
            for param in group["params"]
            if param.requires_grad
        ]
        # GradScaler calls step() of such an optimizer, where it can be refused, and not unscale_(), which
        # would find no grads.
        self._supported_scaling = optimizer.__dict__.get("_step_supports_amp_scaling")
        optimizer.__dict__["_step_supports_amp_scaling"] = True
        optimizer.__dict__["_released"] = self

    def remove(self) -> None:
        """Make everything as before. Grads that are not yet stepped wait for ``step()``."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        optimizer = self._active_optimizer()
        if optimizer is None:
            return
        del optimizer.__dict__["_released"]
        if self._supported_scaling is None:
            del optimizer.__dict__["_step_supports_amp_scaling"]
        else:
            optimizer.__dict__["_step_supports_amp_scaling"] = self._supported_scaling

    def __enter__(self) -> ReleaseHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def refuse_scaling(self, optimizer: FusedOptimizer) -> None:
        """Raise if a GradScaler has set its scale: it shows itself only now."""
        names = ("grad_scale", "found_inf")
        if all(getattr(optimizer, name, None) is None for name in names):
            return
        for name in names:  # GradScaler deletes them only after a step that does not raise
            optimizer.__dict__.pop(name, None)
        raise RuntimeError(
            "release_gradients does not work with GradScaler: the params were already stepped, in "
            "the backward, with scaled grads"
        )

    def accumulate_anew(self) -> None:
        """Forget, in ``zero_grad()``, what was accumulated but not yet stepped."""
        with self._lock:
            n = self._accumulation_steps
            self._counts = {param: count for param, count in self._counts.items() if count >= n}

    def stepped(self) -> set[int]:
        """The ids of the params that were stepped since the last ``step()``."""
        with self._lock:
            return {param for param, n in self._counts.items() if n == self._accumulation_steps}

    def end_iteration(self, outcome: Outcome | None) -> Outcome:
        """Sum up, at the end of ``step()``, all that was done since the last ``step()``."""
        with self._lock:
            outcomes = self._outcomes if outcome is None else [*self._outcomes, outcome]
            self._backwards.clear()
            self._restart()
        return (
            sum(outcome[0] for outcome in outcomes),
            sum(outcome[1] for outcome in outcomes),
            sorted(fallback for outcome in outcomes for fallback in outcome[2] or ()),
        )

    def completed(self, param: Tensor) -> None:
        """A param's hook: a backward has added all it has to this param's grad."""
        optimizer = self._active_optimizer()
        if optimizer is None:
            return
        with self._lock:
            try:
                task = torch._C._current_graph_task_id()
                if task not in self._backwards:
                    self._begin_backward(optimizer, task)
                count = self._counts[id(param)] = self._counts.get(id(param), 0) + 1
                if count > self._accumulation_steps or self._overrun:
                    self._refuse_backward(optimizer, param)
                if count == self._accumulation_steps:
                    self._add(optimizer, param)
            except BaseException:
                self._failed = True
                raise

    def end_backward(self, task: int) -> None:
        """The engine's callback: what is left in the bucket gets its kernel call."""
        optimizer = self._active_optimizer()
        with self._lock:
            self._backwards.pop(task, None)
            if optimizer is None or self._failed:
                return
            try:
                self._step_bucket(optimizer)
            except BaseException:
                self._failed = True
                raise

    def _active_optimizer(self) -> FusedOptimizer | None:
        """The optimizer; None after remove(), or if it is no more."""
        optimizer = self._optimizer()
        if optimizer is None or optimizer.__dict__.get("_released") is not self:
            return None
        return optimizer

    def _begin_backward(self, optimizer: FusedOptimizer, task: int) -> None:
        # The engine drops the callbacks of a backward that fails. An outer one, in which a reentrant
        # checkpoint has begun this one, it still holds.
        alive = {task: ref for task, ref in self._backwards.items() if ref() is not None}
        if (self._failed or len(alive) < len(self._backwards)) and not self._overrun:
            self._restart()
        if optimizer._why_no_step is not None:
            raise RuntimeError(f"a backward {optimizer._why_no_step}")
        reason = _optimizer_refusal(optimizer, of_release=False)
        if reason is not None:
            raise RuntimeError(f"release_gradients cannot work any more: {reason}")
        _refuse_surroundings()
        self.refuse_scaling(optimizer)
        backward = _Backward(self, task)
        torch.autograd.Variable._execution_engine.queue_callback(backward)  # type: ignore[attr-defined]
        self._backwards = {**alive, task: weakref.ref(backward)}

    def _restart(self) -> None:
        self._failed = self._overrun = False
        self._counts.clear()
        self._outcomes = []
        self._buckets[self._ordinal].clear()
        self._ordinal = 0

    def _refuse_backward(self, optimizer: FusedOptimizer, param: Tensor) -> None:
        self._overrun = True
        g, i = self._position(optimizer, param) or (None, None)
        n = self._accumulation_steps
        raise RuntimeError(
            f"release_gradients(accumulation_steps={n}): a backward reaches param {i} of group {g} when "
            f"optimizer.step() has not been called after {n}. Call step() after each "
            "accumulation_steps backwards, or pass how many there are"
        )

    def _add(self, optimizer: FusedOptimizer, param: Tensor) -> None:
        """Put a param into the bucket, and step the bucket when it is full."""
        bucket = self._buckets[self._ordinal]
        if bucket.numel >= self._bucket_numel:
            self._step_bucket(optimizer)
            bucket = self._buckets[self._ordinal]
        bucket.add(param)
        if bucket.numel >= self._bucket_numel:
            # Hooks that the program has registered behind ours must find the grad: then the bucket waits
            # for the next param.
            hooks = param._post_accumulate_grad_hooks
            if not hooks or next(reversed(hooks.values())) is self._hook:
                self._step_bucket(optimizer)

    def _step_bucket(self, optimizer: FusedOptimizer) -> None:
        bucket = self._buckets[self._ordinal]
        params = [(param, self._position(optimizer, param)) for param in bucket.params]
        outcome = bucket.step(optimizer, [(p, at) for p, at in params if at is not None])
        if outcome is None:
            return
        self._outcomes.append(outcome)
        self._ordinal += 1
        if self._ordinal == len(self._buckets):
            self._buckets.append(Bucket())

    def _position(self, optimizer: FusedOptimizer, param: Tensor) -> tuple[int, int] | None:
        """(group, index) of a param; None if it has been taken out of the optimizer."""
        groups = optimizer.param_groups
        try:
            at = self._positions[id(param)]
            if at is None or groups[at[0]]["params"][at[1]] is param:
                return at
        except LookupError:  # the first time, or the program has changed the groups
            pass
        self._positions = {
            id(member): (g, i)
            for g, group in enumerate(groups)
            for i, member in enumerate(group["params"])
        }
        return self._positions.setdefault(id(param), None)


class _Hook:
    """Called with each param whose grad is complete."""

    def __init__(self, handle: ReleaseHandle) -> None:
        self._handle = weakref.ref(handle)

    def __call__(self, param: Tensor) -> None:
        handle = self._handle()
        if handle is not None:
            handle.completed(param)

    left_to_the_interpreter(__call__)

    def is_active(self) -> bool:
        handle = self._handle()
        return handle is not None and handle._active_optimizer() is not None


class _Backward:
    """One run of autograd's engine, which holds this until it has ended or failed."""

    def __init__(self, handle: ReleaseHandle, task: int) -> None:
        self._handle = weakref.ref(handle)
        self._task = task

    def __call__(self) -> None:
        handle = self._handle()
        if handle is not None:
            handle.end_backward(self._task)

    left_to_the_interpreter(__call__)


def _optimizer_refusal(optimizer: FusedOptimizer, of_release: bool = True) -> str | None:
    """Reason that its params cannot be stepped one after the other, or None."""
    needs_all = "needs all grads before the first param is written"
    if getattr(optimizer, "max_grad_norm", None) is not None:
        return f"max_grad_norm {needs_all}"
    if getattr(optimizer, "skip_nonfinite", False):
        return f"skip_nonfinite {needs_all}"
    if getattr(optimizer, "zero_grads", False):
        return "zero_grads has nothing left to zero"
    for g, group in enumerate(optimizer.param_groups):
        for option in ("capturable", "differentiable"):
            if group.get(option):
                return f"param group {g} has {option}=True"
    if of_release and optimizer.__dict__.get("_released") is not None:
        return "the optimizer already releases its grads; call remove() on that handle first"
    return None


# Looked up in what is imported: none of them exists before its module does, and importing takes a second.
_DISTRIBUTED_MODULES = (
    ("torch.nn.parallel", "DistributedDataParallel"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
)


def _model_refusal(model: torch.nn.Module) -> str | None:
    for module_name, name in _DISTRIBUTED_MODULES:
        kind = getattr(sys.modules.get(module_name), name, None)
        if kind is not None and any(isinstance(module, kind) for module in model.modules()):
            return f"the model is or has a {name}, which reduces grads after they are accumulated"
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    if kind is not None and any(isinstance(param, kind) for param in model.parameters()):
        return "the model has DTensor params"
    return None


def _refuse_surroundings() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        n_processes = distributed.get_world_size()
        if n_processes > 1:
            raise RuntimeError(
                f"release_gradients cannot work: torch.distributed has {n_processes} processes, and "
                "each would step on its own grads"
            )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("release_gradients cannot work while a CUDA graph is captured")


def _refuse_params(model: torch.nn.Module, optimizer: FusedOptimizer) -> None:
    of_model = {id(param) for param in model.parameters()}
    seen = set()
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            where = f"release_gradients cannot work: param {i} of group {g}"
            if id(param) not in of_model:
                raise ValueError(f"{where} does not belong to the model")
            if id(param) in seen:
                raise ValueError(f"{where} is there twice")
            seen.add(id(param))
            hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
            if any(isinstance(hook, _Hook) and hook.is_active() for hook in hooks.values()):
                raise ValueError(f"{where} is already released, by another optimizer")
