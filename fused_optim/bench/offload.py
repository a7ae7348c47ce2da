"""The host's half of offloaded training: AdamW on float32 masters, grads and the model's params in bfloat16.

Ours is one call; torch's are casts of the grads, a fused step, and copies to the outputs, as engines have
them. A peer steps among the same casts and copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fused_optim
from fused_optim import StepReport, backends, functional
from fused_optim.bench import contestants
from fused_optim.bench.agreement import Disagreement, expect_near
from fused_optim.bench.contestants import OURS, STOCK_CALLS, Entrants
from fused_optim.bench.peers import Peer
from fused_optim.bench.timing import Step
from fused_optim.bench.workloads import Workload

_torch: Any = torch  # whose functions on lists of tensors have no public types
WHOLE = "one call"
# Stock's update and ours round differently, and a grad of bfloat16 moves a param by lr at most.
TOLERANCE = 1e-6


class Host:
    """Masters, their states and outputs, and the call that steps them."""

    def __init__(self, params: Sequence[nn.Parameter], grads: list[Tensor]) -> None:
        self.masters = [param.detach() for param in params]
        self.grads = grads
        self.exp_avgs = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sqs = [torch.zeros_like(master) for master in self.masters]
        self.steps = [torch.tensor(0.0) for _ in self.masters]
        self.outputs = [master.bfloat16() for master in self.masters]
        group = fused_optim.AdamW([torch.zeros(1)]).param_groups[0]
        names = ("lr", "eps", "weight_decay", "amsgrad", "maximize")
        self._hypers: dict[str, Any] = {name: group[name] for name in names}
        self._hypers["beta1"], self._hypers["beta2"] = group["betas"]
        kernels = "cpu" if backends.cpu_kernels() is not None else "stock"
        self.last_step = StepReport({kernels: len(self.masters)}, [])

    def step(self, part: slice = slice(None)) -> None:
        """Step all tensors, or a part of them."""
        functional.adamw(
            self.masters[part],
            self.grads[part],
            self.exp_avgs[part],
            self.exp_avg_sqs[part],
            [],
            self.steps[part],
            outputs=self.outputs[part],
            **self._hypers,
        )

    def in_pieces(self, n: int, worker: ThreadPoolExecutor) -> Step:
        """Step as many tensors in each of n calls, from another thread."""
        size = -(-len(self.masters) // n)
        parts = [slice(i * size, (i + 1) * size) for i in range(n)]

        def step() -> None:
            for call in [worker.submit(self.step, part) for part in parts]:
                call.result()

        return step

    def nbytes(self) -> int:
        """Bytes that a step reads and writes."""
        read_only = sum(tensor.nbytes for tensor in (*self.grads, *self.outputs))
        return read_only + 2 * sum(
            tensor.nbytes for tensor in (*self.masters, *self.exp_avgs, *self.exp_avg_sqs)
        )


def enter(workload: Workload, params: list[nn.Parameter], peers: Sequence[Peer]) -> Entrants:
    """Build all contestants and compare a step of torch's with ours.

    Args:
        params: with grads, in float32; they become ours.

    Raises:
        Disagreement: masters or outputs differ by more than rounding.
    """
    grads = [param.grad.bfloat16() for param in params if param.grad is not None]
    if workload.offload > 1:
        whole = Host(contestants.copy_params(params, workload.layout), grads)
        ours = Host(params, grads)
        # One thread for both: OpenMP's helpers of another one would still wait for work, busily.
        worker = ThreadPoolExecutor(1)
        steps = {OURS: ours.in_pieces(workload.offload, worker), WHOLE: whole.in_pieces(1, worker)}
        not_measured: dict[str, str] = {}
    else:
        copies = contestants.copy_params(params, workload.layout)
        ours, stock = Host(params, grads), contestants.stock(workload, copies, "fused")
        steps = {OURS: ours.step, STOCK_CALLS: _with_casts(copies, grads, stock)}
        for step in steps.values():
            step()
        _compare(ours, copies)
        not_measured = {}
        for peer in peers:
            with contestants.reported(peer.name, not_measured):
                copies = contestants.copy_params(params, workload.layout)
                step = _with_casts(copies, grads, peer.build(workload, copies))
                step()
                steps[peer.name] = step
    return Entrants(
        ours=ours,
        steps=steps,
        baselines=[name for name in (STOCK_CALLS, WHOLE) if name in steps],
        nbytes=ours.nbytes(),
        n_streams=4,  # a float32 step's moves as many bytes
        not_measured=not_measured,
    )


def _with_casts(
    params: Sequence[nn.Parameter], grads: list[Tensor], optimizer: Optimizer
) -> Callable[[], None]:
    outputs = [param.detach().bfloat16() for param in params]
    wide = [param.grad for param in params]

    def step() -> None:
        _torch._foreach_copy_(wide, grads)
        optimizer.step()
        with torch.no_grad():
            _torch._foreach_copy_(outputs, list(params))

    return step


def _compare(ours: Host, stock: Sequence[nn.Parameter]) -> None:
    tensors = zip(ours.masters, ours.outputs, stock, strict=True)
    for i, (master, output, param) in enumerate(tensors):
        expect_near(f"param {i}", param, master, TOLERANCE)
        if not torch.equal(output, master.bfloat16()):
            raise Disagreement(f"output {i} is not its param, rounded")
