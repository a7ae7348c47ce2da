"""From the gatherer's batches to launches: uploads what has changed, compiles what is new, launches.

Nothing here waits for a device. A captured CUDA graph keeps the addresses of its tables, so those stay for
the optimizer's life.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .measure import GradBatch, OnePass, Totals, squares_of
from .multi_tensor import ROW, UNSCALED, multi_tensor
from .on_device import NO_PINNED_MEMORY, OnDevice, capturing, device_of, dtype_of, on, warp_size
from .prepare import prepare
from .specialize import PREPARE_BLOCK, Specialization, prepare_constants
from .tables import Batch, DeviceCopy, chunks_of

# A row's place in the arguments of `multi_tensor`, where the table has it.
_IN_TABLE = (1, *(0,) * ROW.value)


class _Launch(OnDevice):
    """One batch on its device."""

    def __init__(self, rule: str, batch: Batch, interpreted: bool) -> None:
        device_type, index, dtypes, storages, self.prepares = batch.key
        super().__init__(device_of(device_type, index), interpreted)
        self._specialization = Specialization(
            rule, dtypes, storages, warp_size=warp_size(interpreted), interpreted=interpreted
        )
        self._prepare_constants = prepare_constants(rule, averages=dtypes[-1] is not None)
        is_wide = self._specialization.word is tl.int64
        self._word = torch.int64 if is_wide else torch.int32
        # The types of what is handed over by value are those of the first time.
        self._widest = (0, *(1 << 40 if is_wide else 0,) * ROW.value)
        self._tensors = DeviceCopy(torch.int64, self.device)
        self._scalars = DeviceCopy(torch.int64, self.device)
        self._addresses = DeviceCopy(torch.int64, self.device)
        self._options = DeviceCopy(torch.float64, self.device)
        self._rows = DeviceCopy(self._word, self.device)
        self._chunks = DeviceCopy(torch.int32, self.device)
        self._hypers: Tensor | None = None  # written by prepare, or not read
        self._brought: tuple[int, int] | None = None  # version and stream
        self._n_tensors = self._n_chunks = 0

    def copies(self) -> tuple[DeviceCopy, ...]:
        return (
            self._tensors,
            self._scalars,
            self._addresses,
            self._options,
            self._rows,
            self._chunks,
        )

    def forget(self) -> None:
        self._hypers = None

    def ready(
        self,
        batch: Batch,
        grad_write: int,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None,
    ) -> str | None:
        """Everything that may fail; why it does, or None. Call it under the guard."""
        self.look_around()
        words = batch.words
        self._row = _IN_TABLE if words is None else (0, *words)
        now = batch.version, self.stream
        if now != self._brought or self.is_capturing:
            self._brought = None
            if not self._bring(batch):
                return NO_PINNED_MEMORY
            if not self.is_capturing:  # which only takes note of copies
                self._brought = now
        self._scaling = grad_scale, found_inf, clip
        key = grad_write, dtype_of(grad_scale), dtype_of(found_inf), dtype_of(clip)
        update = self._kernels.get(key)
        if update is None:
            specialization = replace(self._specialization, grad_write=grad_write)
            update = self._kernels[key] = self.kernel(
                multi_tensor,
                (*self._tables, *self._scaling, *self._widest),
                specialization.constants(),
                specialization.num_warps,
            )
        self._update = update
        if self.prepares:
            key = (dtype_of(found_inf),)
            if key not in self._kernels:
                self._kernels[key] = self.kernel(
                    prepare, self._prepare_args(), self._prepare_constants, PREPARE_BLOCK // 32
                )
            self._prepare = self._kernels[key]
        return None

    def _bring(self, batch: Batch) -> bool:
        """Have the device's copies of all tables. False: no pinned memory."""
        capturing = self.is_capturing
        self._n_tensors = batch.n_tensors
        there = self._tensors.bring_table(batch.tensors, capturing)
        n_rows = 1
        if self.prepares:
            there = there and self._scalars.bring_table(batch.scalars, capturing)
            there = there and self._addresses.bring_table(batch.addresses, capturing)
            there = there and self._options.bring_table(batch.options, capturing)
            n_rows = self._n_tensors
        elif batch.words is None:
            there = there and self._rows.bring_table(batch.hypers, capturing)
        if self._hypers is None or len(self._hypers) < n_rows:
            self._hypers = torch.empty(n_rows, ROW.value, dtype=self._word, device=self.device)
        if self._chunks.version != batch.numels.version:
            chunks = chunks_of(batch.numels.tolist(), self._specialization.chunk)
            there = there and self._chunks.bring(
                batch.numels.version, chunks.numel(), lambda host: host.copy_(chunks), capturing
            )
        if not there:
            return False
        assert self._chunks.tensor is not None
        self._n_chunks = self._chunks.tensor.numel() // 2
        in_table = not self.prepares and batch.words is None
        hypers = self._rows.tensor if in_table else self._hypers
        self._tables = self._tensors.tensor, self._chunks.tensor, hypers
        return True

    def launch(self) -> None:
        if self.prepares:
            n_programs = -(-self._n_tensors // PREPARE_BLOCK)
            self._prepare(n_programs, self._prepare_args(), self.stream)
        if self._n_chunks > 0:
            args = (*self._tables, *self._scaling, *self._row)
            self._update(self._n_chunks, args, self.stream)

    def held(self) -> list:
        """What a captured graph needs as long as it is replayed."""
        return [self._hypers, self._scaling, *(copy.tensor for copy in self.copies())]

    def _prepare_args(self) -> tuple:
        tables = (self._scalars.tensor, self._options.tensor, self._addresses.tensor, self._hypers)
        return *tables, self._scaling[1], self._n_tensors


class Launcher:
    """The device side of one optimizer. fused_optim/step.py calls it in the order of the methods,
    the gatherer `scalar`.

    Args:
        rule: key of RULES.
        interpreted: whether CPU tensors are served, in Triton's interpreter.
        debug: whether the traceback of each failure is printed that is warned of.
    """

    def __init__(self, rule: str, interpreted: bool, debug: bool = False) -> None:
        self._rule = rule
        self._debug = debug
        self._interpreted = interpreted
        self._launches: dict[Any, _Launch] = {}
        self._ready: list[_Launch] = []
        self._all_totals: dict[torch.device, Totals] = {}
        self._totals: dict[torch.device, Totals] = {}  # of the step under way
        self._staged: list[tuple[Tensor, Tensor]] = []
        self._captured: list = []
        self._failure: str | None = None  # why the kernels are not tried in this step
        self._n_failures = 0  # in a row
        self._steps_to_wait = 0
        self._warned_of: set[str] = set()
        self._one_pass: OnePass | None = None
        self._grad_scale: Tensor | None = None
        self._found_inf: Tensor | None = None

    def begin(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        one_pass: OnePass | None = None,
    ) -> None:
        """A new step: grads are divided by grad_scale, and nothing is changed if found_inf is not 0."""
        self._one_pass = one_pass
        self._grad_scale = grad_scale
        self._found_inf = found_inf
        self._staged.clear()
        self._ready.clear()
        self._totals.clear()

    def adopt(self, other: Launcher | None) -> None:
        """Keep what graphs of another launcher of the same optimizer need."""
        if other is not None:
            self._captured += [other, *other._captured]

    def scalar(self, number: Any, param: Tensor) -> Tensor:
        """A number that belongs to a param, a step say, as a tensor on the param's device."""
        dtype = number.dtype if isinstance(number, Tensor) else torch.float32
        return torch.full((), float(number), dtype=dtype, device=param.device)

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

    def ready(
        self, batches: Sequence[Batch], grads: Sequence[GradBatch], grad_write: int
    ) -> str | None:
        """Compile and upload; why that cannot be, or None. Nothing has been written then.

        What failed is tried again at the next step, then 10, 100, 1000 ... steps later: it may have been a
        full disk or memory, but looking for a compiler that is not there takes its time.

        Args:
            grads: what is measured, if anything is.
            grad_write: what is left in the grads, see multi_tensor.py.
        """
        if self._steps_to_wait > 0:
            self._steps_to_wait -= 1
            return self._failure
        failure = None
        try:
            launches = [self._launch_of(batch) for batch in batches]
            if self._one_pass is not None and (
                grads or self._grad_scale is not None or self._found_inf is not None
            ):
                for device in dict.fromkeys(launch.device for launch in launches):
                    failure = failure or self._ready_totals(device, grads, self._one_pass)
            for launch, batch in zip(launches, batches):
                failure = failure or self._ready_launch(launch, batch, grad_write)
        except torch.OutOfMemoryError:
            raise
        # Triton may fail in any way: no C compiler, an old device, a full disk.
        except Exception as error:
            failure = f"Triton failed: {type(error).__name__}: {error}"
            if not capturing():  # where little is allowed; later steps may do better
                self._failure = failure
                self._steps_to_wait = 10**self._n_failures - 1
                self._n_failures += 1
            if self._debug and failure not in self._warned_of:
                traceback.print_exc()
        if failure is None:
            self._n_failures = 0
            return None
        self._totals.clear()
        if failure not in self._warned_of:
            self._warned_of.add(failure)
            warnings.warn(
                f"fused_optim runs torch.optim's own code for these tensors. {failure}",
                RuntimeWarning,
                stacklevel=2,
            )
        return failure

    def _launch_of(self, batch: Batch) -> _Launch:
        launch = self._launches.get(batch.key)
        if launch is None:
            launch = self._launches[batch.key] = _Launch(self._rule, batch, self._interpreted)
        return launch

    def _ready_totals(
        self, device: torch.device, grads: Sequence[GradBatch], one_pass: OnePass
    ) -> str | None:
        totals = self._all_totals.get(device)
        if totals is None:
            totals = self._all_totals[device] = Totals(device, self._interpreted)
        there = [batch for batch in grads if device_of(*batch.key[:2]) == device]
        self._totals[device] = totals
        with totals.guard():
            return totals.ready(there, one_pass, self._grad_scale, self._found_inf)

    def _ready_launch(self, launch: _Launch, batch: Batch, grad_write: int) -> str | None:
        totals = self._totals.get(launch.device) if self._totals else None
        divides = grad_write == UNSCALED.value
        with launch.guard():
            grad_scale = on(launch.device, self._grad_scale) if divides else None
            if totals is None:
                found_inf, clip = on(launch.device, self._found_inf), None
            else:
                found_inf = totals.found_inf
                clip = totals.clip if divides and totals.factor is not None else totals.factor
            failure = launch.ready(batch, grad_write, grad_scale, found_inf, clip)
        self._ready.append(launch)
        return failure

    def measure(self, others: Sequence[Tensor], waits: bool) -> tuple[Tensor, Tensor] | None:
        """Read the grads; their norm and the coefficient that clips them, without waiting.

        Args:
            others: grads that no kernel reads.
            waits: whether the host has to know.

        Returns:
            None if the host has to decide, since it has to know, or not all grads lie on one device:
            read() and decide() then come next.
        """
        for totals in self._totals.values():
            with totals.guard():
                totals.sum_up()
        if waits or len(self._totals) != 1:
            return None
        (totals,) = self._totals.values()
        extra = squares_of(others, totals.device) if others else None
        if others and extra is None:
            return None
        with totals.guard():
            totals.finish(extra)
        return totals.norm, totals.clip

    def read(self) -> tuple[float, bool]:
        """The sum of the squares, and whether some grad is not finite. Waits for the devices."""
        found = [totals.read() for totals in self._totals.values()]
        return sum(squares for squares, _ in found), any(nonfinite for _, nonfinite in found)

    def decide(self, clip: float) -> None:
        """The step is not skipped, and the grads are multiplied by `clip`."""
        for totals in self._totals.values():
            totals.decide(clip)

    @property
    def found_inf(self) -> Tensor | None:
        """Not 0 if the step under way is skipped; None: it is not."""
        for totals in self._totals.values():
            if totals.found_inf is not None:
                return totals.found_inf
        return self._found_inf

    def launch(self) -> None:
        """Launch what is ready, on the current stream of each device; all of it, if one raises."""
        failure = None
        for totals in self._totals.values():
            if not totals.is_finished:  # nothing was measured
                with totals.guard():
                    totals.finish()
            if totals.is_capturing:
                self._captured.append(totals.held())
        for launch in self._ready:
            try:
                with launch.guard():
                    launch.launch()
                    if launch.is_capturing:
                        self._captured.append(launch.held())
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
