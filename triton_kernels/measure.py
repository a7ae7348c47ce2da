"""The norm of one device's grads, the coefficient that clips them, and whether the step is skipped.

All of it stays on the device: the kernels of the step read it there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from .norm import AHEAD, CLIP, FACTOR, FOUND_INF, NORM, NORM_CHUNK, RESULT, finish, norm
from .on_device import NO_PINNED_MEMORY, Launch, OnDevice, dtype_of, on, warp_size
from .specialize import FINISH_WARPS, norm_constants, norm_warps
from .tables import DeviceCopy, Table, chunks_of


class GradBatch(Protocol):
    """Grads of one device and dtype (csrc/tables.h); key: DLPack device type and index, dtype name."""

    key: tuple[int, int, str]

    @property
    def version(self) -> int: ...

    numels: Table
    grads: Table


class OnePass(Protocol):
    """fused_optim.clipping.Clipping."""

    n_skipped_on_device: Tensor | None

    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def skips(self) -> bool: ...
    @property
    def report(self) -> Tensor | None: ...


class Totals(OnDevice):
    """One device's part.

    Attributes, of the step under way, tensors on the device:
        norm: float64, of the grads divided by the grad scale.
        clip: what the grads, so divided, are multiplied by.
        factor: what the grads are multiplied by if they are not divided before; None: 1.
        found_inf: not 0 if the step is skipped; None: it cannot be.
    """

    def __init__(self, device: torch.device, interpreted: bool) -> None:
        super().__init__(device, interpreted)
        self._tables: dict[str, tuple[DeviceCopy, DeviceCopy]] = {}  # by dtype: grads, chunks
        self._limit = DeviceCopy(torch.float64, device)
        self._partials: Tensor | None = None
        self._no_extra = torch.zeros(2, dtype=torch.float64, device=device)
        self._sums: list[tuple[Launch, int, tuple]] = []
        self._brought: tuple | None = None  # what the tables are, and the stream
        self.is_finished = False

    def copies(self) -> Iterator[DeviceCopy]:
        return chain([self._limit], *self._tables.values())

    def forget(self) -> None:
        self._partials = None

    def ready(
        self,
        batches: Sequence[GradBatch],
        one_pass: OnePass,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> str | None:
        """Everything that may fail; why it does, or None. Call it under the guard."""
        self.look_around()
        self.is_finished = False
        limit = one_pass.max_grad_norm
        if limit is not None and math.isinf(limit):
            limit = None  # it measures and never clips
        now = limit, self.stream, *((batch.key, batch.version) for batch in batches)
        if now != self._brought or self.is_capturing:
            self._brought = None
            if not self._bring(batches, limit):
                return NO_PINNED_MEMORY
            self._plan_sums(batches)
            if not self.is_capturing:  # which only takes note of copies
                self._brought = now
        self._one_pass = one_pass
        self._grad_scale, scaler_found_inf = on(self.device, grad_scale), on(self.device, found_inf)
        # A new one each time: the user keeps the norm.
        self._result = torch.empty(RESULT.value, dtype=torch.float64, device=self.device)
        parts = self._result.unbind()
        self.norm, self.clip = parts[NORM.value], parts[CLIP.value]
        is_factor = limit is not None or grad_scale is not None
        self.factor = parts[FACTOR.value] if is_factor else None
        may_skip = one_pass.skips or found_inf is not None
        self.found_inf = parts[FOUND_INF.value] if may_skip else None
        report, n_skipped = one_pass.report, None
        self._report_elsewhere = None
        if report is not None and report.device != self.device:
            report, self._report_elsewhere = None, report
        if may_skip:
            n_skipped = one_pass.n_skipped_on_device
            if n_skipped is None or n_skipped.device != self.device:
                kept = 0 if n_skipped is None else int(n_skipped.item())
                n_skipped = torch.full((), kept, dtype=torch.int64, device=self.device)
                one_pass.n_skipped_on_device = n_skipped
        self._finish_args = (
            None if limit is None else self._limit.tensor,
            self._grad_scale,
            scaler_found_inf,
            report,
            n_skipped,
            self._result,
        )
        key = one_pass.skips, *map(dtype_of, self._finish_args)
        if key not in self._kernels:
            constants = {"SKIPS_NONFINITE": one_pass.skips}
            args = self._args(self._no_extra)
            self._kernels[key] = self.kernel(finish, args, constants, FINISH_WARPS)
        self._finish = self._kernels[key]
        return None

    def _bring(self, batches: Sequence[GradBatch], limit: float | None) -> bool:
        """Have the device's copies of all tables. False: no pinned memory."""
        capturing = self.is_capturing
        there = True
        for batch in batches:
            grads, chunks = self._table(batch.key[2])
            there = there and grads.bring_table(batch.grads, capturing)
            if chunks.version != batch.numels.version:
                cut = chunks_of(batch.numels.tolist(), NORM_CHUNK.value)
                there = there and chunks.bring(
                    batch.numels.version,
                    cut.numel(),
                    lambda host, cut=cut: host.copy_(cut),
                    capturing,
                )
        if limit is not None:
            there = there and self._limit.bring(limit, 1, lambda host: host.fill_(limit), capturing)
        return there

    def _plan_sums(self, batches: Sequence[GradBatch]) -> None:
        tables = [(batch.key[2], *self._table(batch.key[2])) for batch in batches]
        n_chunks = [
            chunks.tensor.numel() // 2 for _, _, chunks in tables if chunks.tensor is not None
        ]
        self._n_partials = sum(n_chunks)
        if self._partials is None or len(self._partials) < 2 * self._n_partials:
            self._partials = torch.empty(
                max(2 * self._n_partials, AHEAD.value), dtype=torch.float64, device=self.device
            )
        self._sums = []
        for (dtype, grads, chunks), n in zip(tables, n_chunks):
            args = (grads.tensor, chunks.tensor, self._partials, self._n_partials)
            if (dtype,) not in self._kernels:
                constants = norm_constants(dtype, self.interpreted)
                num_warps = norm_warps(dtype, warp_size(self.interpreted))
                self._kernels[(dtype,)] = self.kernel(norm, args, constants, num_warps)
            if n > 0:
                self._sums.append((self._kernels[(dtype,)], n, args))

    def _table(self, dtype: str) -> tuple[DeviceCopy, DeviceCopy]:
        if dtype not in self._tables:
            self._tables[dtype] = (
                DeviceCopy(torch.int64, self.device),
                DeviceCopy(torch.int32, self.device),
            )
        return self._tables[dtype]

    def _args(self, extra: Tensor) -> tuple:
        return self._partials, self._n_partials, extra, *self._finish_args

    def sum_up(self) -> None:
        """Read the grads."""
        for kernel, n_programs, args in self._sums:
            kernel(n_programs, args, self.stream)

    def finish(self, extra: Tensor | None = None) -> None:
        """Find the norm, the coefficient and whether the step is skipped.

        Args:
            extra: float64 [2]: the sum of the squares of other grads, and whether one is not finite.
        """
        args = self._args(self._no_extra if extra is None else extra)
        self._finish(1, args, self.stream)
        if self._report_elsewhere is not None:
            self._report_elsewhere.copy_(self._result[FOUND_INF.value], non_blocking=True)
        self.is_finished = True

    def read(self) -> tuple[float, bool]:
        """The sum of the squares, and whether some grad is not finite. Waits for the device."""
        assert self._partials is not None
        sums, flags = self._partials[: 2 * self._n_partials].cpu().view(2, self._n_partials)
        return sums.sum().item(), bool(flags.any())

    def decide(self, clip: float) -> None:
        """The host has found the coefficient, and that the step is not skipped."""
        scale = 1.0 if self._grad_scale is None else self._grad_scale.item()
        result = torch.zeros(RESULT.value, dtype=torch.float64, device="cpu")
        result[CLIP.value], result[FACTOR.value] = clip, clip * (1 / scale)
        self._result.copy_(result)
        self.is_finished = True

    def held(self) -> list[Any]:
        """Memory that a captured graph needs as long as it is replayed."""
        copies = [copy.tensor for copy in self.copies()]
        return [self._partials, self._no_extra, self._finish_args, *copies]


@torch.no_grad()
def squares_of(grads: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """`extra` of Totals.finish for these grads, without waiting; None if some are not plain tensors there."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for grad in grads:
        if type(grad) is not Tensor or grad.device != device:
            return None
        dense = grad.coalesce().values() if grad.is_sparse else grad
        wide = torch.complex128 if dense.is_complex() else torch.float64
        size = torch.linalg.vector_norm(dense, dtype=wide)
        total += torch.stack([size * size, (~dense.isfinite()).any().double()])
    return total
