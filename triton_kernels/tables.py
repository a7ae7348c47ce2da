"""The tables that the kernels read: what the gatherer offers, and the device's copies of it.

Tables travel through pinned memory of torch's allocator, which takes a block back only when its copy has
run; device memory comes from torch's allocator on the stream in use. A captured CUDA graph makes its
copies again with each replay, so their sources stay as long as the copy does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# Uploads of one table that captures may make between two steps outside of one.
N_SPARES = 3


class Table(Protocol):
    """An array on the host; another version says other contents."""

    @property
    def version(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def copy_to(self, address: int) -> None: ...
    def tolist(self) -> list: ...


class Batch(Protocol):
    """All tensors of one launch (csrc/tables.h); the tables' columns stand in multi_tensor and prepare.

    Attributes:
        key: DLPack device type and index, dtypes and storages of the streams by name, and whether
            the hypers have to be prepared on the device.
        version: another one says that some table has to be uploaded.
        words: the hypers, if there is one row and the host knows it; `hypers` need not be uploaded then.
    """

    key: tuple[int, int, tuple[str | None, ...], tuple[str, ...], bool]

    @property
    def version(self) -> int: ...
    @property
    def n_tensors(self) -> int: ...
    @property
    def words(self) -> tuple[int, ...] | None: ...

    numels: Table
    tensors: Table
    scalars: Table
    addresses: Table
    options: Table
    hypers: Table


class DeviceCopy:
    """The device's copy of one table."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.version: float | None = None
        self.tensor: Tensor | None = None
        self._spares: list[Tensor] = []  # pinned memory may not be had during a capture
        self._captured: list[
            tuple[Tensor, Tensor]
        ] = []  # copies that graphs make again, and their sources

    def bring(
        self, version: float, numel: int, fill: Callable[[Tensor], object], capturing: bool
    ) -> bool:
        """Upload what `fill` writes, unless the copy is of this version. False: no pinned memory."""
        if self.version == version:
            return True
        if self.device.type == "cpu":
            host = torch.empty(numel, dtype=self.dtype, device="cpu")
        elif capturing:
            if not self._spares or self._spares[-1].numel() < numel:
                return False
            host = self._spares.pop()[:numel]
        else:
            host = self._pinned(numel)
            self._spares = [spare for spare in self._spares if spare.numel() >= numel]
            while len(self._spares) < N_SPARES:
                self._spares.append(self._pinned(numel))
        fill(host)
        self.tensor = host.to(self.device, non_blocking=True)
        self.version = version
        if capturing:
            # A capture only takes note of the copy; each replay makes it again, from the same memory.
            self._captured.append((self.tensor, host))
            self.version = None
        return True

    def _pinned(self, numel: int) -> Tensor:
        return torch.empty(numel, dtype=self.dtype, device="cpu", pin_memory=True)

    def bring_table(self, table: Table, capturing: bool) -> bool:
        numel = table.nbytes // self.dtype.itemsize
        return self.bring(
            table.version, numel, lambda host: table.copy_to(host.data_ptr()), capturing
        )


def chunks_of(numels: list[int], chunk: int) -> Tensor:
    """int32 [n_chunks * 2]: which tensor, and which `chunk` elements of it, for each program."""
    n_chunks = (torch.tensor(numels, dtype=torch.int64, device="cpu") + chunk - 1) // chunk
    tensor = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), n_chunks)
    first = torch.repeat_interleave(n_chunks.cumsum(0) - n_chunks, n_chunks)
    index = torch.arange(len(tensor), device="cpu") - first
    return torch.stack([tensor, index], dim=1).to(torch.int32).flatten()
