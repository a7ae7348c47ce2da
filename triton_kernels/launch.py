"""From the gatherer's batches to launches: uploads what has changed, compiles what is new, launches.

Nothing here waits for a device. A captured CUDA graph keeps the addresses of its tables, so those stay for
the optimizer's life.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .multi_tensor import ROW, multi_tensor
from .prepare import prepare
from .specialize import COMPILE_OPTIONS, PREPARE_BLOCK, Specialization, prepare_constants
from .tables import Batch, DeviceCopy, chunks_of

CPU = 1  # DLPack's number; every other device here is torch's "cuda", which ROCm answers to as well
NO_PINNED_MEMORY = "no pinned memory was at hand while a CUDA graph was captured"


class _Launch:
    """One batch on its device."""

    def __init__(self, rule: str, batch: Batch, interpreted: bool) -> None:
        device_type, index, dtypes, options, self.prepares = batch.key
        self.device = torch.device("cpu") if device_type == CPU else torch.device("cuda", index)
        self.specialization = Specialization(
            rule, options, dtypes, _warp_size(interpreted), interpreted
        )
        self._constants = self.specialization.constants()
        self._prepare_constants = prepare_constants(rule)
        self.tensors = DeviceCopy(torch.int64, self.device)
        self.steps = DeviceCopy(torch.int64, self.device)
        self.addresses = DeviceCopy(torch.int64, self.device)
        self.numbers = DeviceCopy(torch.float64, self.device)
        self.chunks = DeviceCopy(torch.int32, self.device)
        self.hypers: Tensor | None = None  # written by prepare
        self.n_tensors = 0
        self.stream: int | None = None
        self._kernels: dict[tuple, Callable[..., object]] = {}

    def guard(self) -> contextlib.AbstractContextManager:
        if self.device.type == "cpu" or torch.cuda.current_device() == self.device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def ready(
        self, batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> str | None:
        """Everything that may fail; why it does, or None. Call it under the guard."""
        capturing = _capturing()
        if self.device.type != "cpu":
            stream = torch.cuda.current_stream(self.device).cuda_stream
            if stream != self.stream and not capturing:
                # What another stream uploads may come too late for this one.
                for copy in self._copies():
                    copy.version = None
                self.hypers = None
                self.stream = stream
        self.n_tensors = batch.n_tensors
        there = self.tensors.bring_table(batch.tensors, capturing)
        there = there and self.numbers.bring_table(batch.numbers, capturing)
        if self.prepares:
            there = there and self.steps.bring_table(batch.steps, capturing)
            there = there and self.addresses.bring_table(batch.addresses, capturing)
            if self.hypers is None or len(self.hypers) < self.n_tensors:
                self.hypers = torch.empty(
                    self.n_tensors, ROW.value, dtype=torch.float64, device=self.device
                )
        if self.chunks.version != batch.numels.version:
            chunks = chunks_of(batch.numels.tolist(), self.specialization.chunk)
            there = there and self.chunks.bring(
                batch.numels.version, chunks.numel(), lambda host: host.copy_(chunks), capturing
            )
        if not there:
            return NO_PINNED_MEMORY
        self.grad_scale = _on(self.device, grad_scale)
        self.found_inf = _on(self.device, found_inf)
        self._update = self._kernel(multi_tensor, self._update_args(), self._constants)
        if self.prepares:
            self._prepare = self._kernel(prepare, self._prepare_args(), self._prepare_constants)
        return None

    def launch(self) -> None:
        if self.prepares:
            self._prepare(triton.cdiv(self.n_tensors, PREPARE_BLOCK), self._prepare_args())
        assert self.chunks.tensor is not None
        n_chunks = self.chunks.tensor.numel() // 2
        if n_chunks > 0:
            self._update(n_chunks, self._update_args())

    def held(self) -> list:
        """What a captured graph needs as long as it is replayed."""
        return [self.hypers, *(copy.tensor for copy in self._copies())]

    def _copies(self) -> tuple[DeviceCopy, ...]:
        return self.tensors, self.steps, self.addresses, self.numbers, self.chunks

    def _update_args(self) -> tuple:
        hypers = self.hypers if self.prepares else self.numbers.tensor
        return self.tensors.tensor, self.chunks.tensor, hypers, self.grad_scale, self.found_inf

    def _prepare_args(self) -> tuple:
        tables = (self.steps.tensor, self.numbers.tensor, self.addresses.tensor, self.hypers)
        return *tables, self.found_inf, self.n_tensors

    def _kernel(
        self, function: Any, args: tuple, constants: dict[str, Any]
    ) -> Callable[..., object]:
        """(number of programs, args) -> launch, loaded onto the device.

        A launch through the function itself costs 16 to 54 us on the host, since it looks at every
        argument again; one through the compiled kernel 3 to 5 us (measured with a stub driver). What
        it would look at is the same each time: dtypes, and which arguments are None.
        """
        dtypes = tuple(arg.dtype if isinstance(arg, Tensor) else arg is None for arg in args)
        kernel = self._kernels.get((function, dtypes))
        if kernel is None:
            if self.specialization.interpreted:

                def kernel(n_programs: int, args: tuple) -> object:
                    return function[(n_programs,)](*args, **constants)
            else:
                compiled = function.warmup(
                    *args,
                    grid=(1,),
                    num_warps=self.specialization.num_warps,
                    **COMPILE_OPTIONS,
                    **constants,
                )
                compiled[(1, 1, 1)]  # loads it; the launch itself must not fail
                values = tuple(constants.values())

                def kernel(n_programs: int, args: tuple) -> object:
                    return compiled[(n_programs, 1, 1)](*args, *values)

            self._kernels[function, dtypes] = kernel
        return kernel


class Launcher:
    """The device side of one optimizer. The gatherer calls it in the order of the methods.

    Args:
        rule: key of RULES.
        interpreted: whether CPU tensors are served, in Triton's interpreter.
    """

    def __init__(self, rule: str, interpreted: bool) -> None:
        self._rule = rule
        self._interpreted = interpreted
        self._launches: dict[Any, _Launch] = {}
        self._ready: list[_Launch] = []
        self._staged: list[tuple[Tensor, Tensor]] = []
        # momentum buffer -> a float32 on its device, 0 until the first step that was not skipped
        self._started: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._reading: tuple[list[Tensor], Tensor, torch.cuda.Event | None] | None = None
        self._captured: list = []
        self._failure: str | None = None
        self._grad_scale: Tensor | None = None
        self._found_inf: Tensor | None = None

    def begin(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """A new step: grads are divided by grad_scale, and nothing is changed if found_inf is not 0."""
        self._grad_scale = grad_scale
        self._found_inf = found_inf
        self._staged.clear()
        self._ready.clear()
        if self._started and not _capturing():
            self._learn_what_has_started()

    def adopt(self, other: Launcher | None) -> None:
        """Keep what graphs and momentum of another launcher of the same optimizer need."""
        if other is None:
            return
        self._captured += [other, *other._captured]
        self._started.update(other._started)

    @property
    def any_waiting(self) -> bool:
        return len(self._started) > 0

    def waiting(self, buffer: Tensor, create: bool) -> int:
        """Address of the number that says whether this momentum has started, 0 if it surely has."""
        started = self._started.get(buffer)
        if started is None and create:
            started = torch.zeros((), device=buffer.device)
            self._started[buffer] = started
        return 0 if started is None else started.data_ptr()

    def forget(self, buffer: Tensor) -> None:
        """This momentum has started, or is no more."""
        self._started.pop(buffer, None)

    def _learn_what_has_started(self) -> None:
        """Forget momentum that has started: without waiting, by numbers asked for in an earlier step."""
        if self._reading is None:
            device = next(iter(self._started.values())).device
            asked = [(b, s) for b, s in self._started.items() if s.device == device]
            numbers = torch.stack([started for _, started in asked])
            event = None
            if device.type != "cpu":
                on_host = torch.empty(len(asked), pin_memory=True)
                numbers = on_host.copy_(numbers, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
            self._reading = [buffer for buffer, _ in asked], numbers, event
            return
        buffers, numbers, event = self._reading
        if event is None or event.query():
            self._reading = None
            for buffer, has_started in zip(buffers, numbers.tolist()):
                if has_started:
                    self.forget(buffer)

    def has_not_started(self, buffer: Tensor) -> bool:
        """Whether no step has reached this momentum yet. Waits for the device."""
        started = self._started.get(buffer)
        return started is not None and started.item() == 0

    def moved(self, step: Tensor, param: Tensor) -> Tensor:
        """The step of a param as a tensor on the param's device."""
        return torch.full((), step.item(), dtype=step.dtype, device=param.device)

    @torch.no_grad()
    def stage(self, originals: Sequence[Tensor], written: Sequence[bool]) -> list[Tensor]:
        """Copies where needed, so that all streams of one tensor (param first) lie in one order.

        Args:
            originals: param, grad and states, of one shape.
            written: whether the kernel writes each of them; launch() copies those back.
        """
        # The param's own order if it is dense.
        order = torch.empty_like(originals[0], memory_format=torch.preserve_format).stride()
        staged = []
        for original, is_written in zip(originals, written):
            if original.stride() == order:
                staged.append(original)
                continue
            copy = torch.empty_strided(
                original.shape, order, dtype=original.dtype, device=original.device
            )
            staged.append(copy.copy_(original.detach()))
            if is_written:
                self._staged.append((original.detach(), copy))
        return staged

    def ready(self, batches: Sequence[Batch]) -> str | None:
        """Compile and upload; why that cannot be, or None. Nothing has been written then."""
        if self._failure is not None:
            return self._failure
        for batch in batches:
            try:
                launch = self._launches.get(batch.key)
                if launch is None:
                    launch = _Launch(self._rule, batch, self._interpreted)
                    self._launches[batch.key] = launch
                with launch.guard():
                    failure = launch.ready(batch, self._grad_scale, self._found_inf)
            except torch.OutOfMemoryError:
                raise
            # Triton may fail in any way: no C compiler, an old device, a full disk.
            except Exception as error:
                failure = f"Triton failed: {type(error).__name__}: {error}"
                if not _capturing():  # where little is allowed; later steps may do better
                    self._failure = failure
            if failure is not None:
                warnings.warn(
                    f"fused_optim runs torch.optim's own code for these tensors. {failure}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return failure
            self._ready.append(launch)
        return None

    def launch(self) -> None:
        """Launch what is ready, on the current stream of each device; all of it, if one raises."""
        failure = None
        for launch in self._ready:
            try:
                with launch.guard():
                    launch.launch()
                    if _capturing():
                        self._captured.append((launch.held(), list(self._started.values())))
            except BaseException as error:
                failure = error
        if self._staged:
            with torch.no_grad():
                for original, copy in self._staged:
                    original.copy_(copy)
            self._staged.clear()
        self._ready.clear()
        if failure is not None:
            raise failure


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _warp_size(interpreted: bool) -> int:
    return 32 if interpreted else triton.runtime.driver.active.get_current_target().warp_size


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    """A number on the device, without waiting for any."""
    if number is None:
        return None
    if number.device.type == "cpu" and device.type != "cpu":
        return torch.full((), number.item(), dtype=torch.float32, device=device)
    if number.dtype not in (torch.float32, torch.float64):
        number = number.float()
    return number.to(device, non_blocking=True)
