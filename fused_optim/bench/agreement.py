"""Whether a peer computes what we compute: else its time would be that of something else."""

import torch
from torch import nn

from fused_optim.bench import contestants
from fused_optim.bench.peers import Peer
from fused_optim.bench.workloads import Workload

N_STEPS = 3
NUMEL = 4096
# Per step, of a param of size 1: two implementations round the decay and the update, each at most half a
# unit. Their updates are of size lr, 1e-3, and roundings in them vanish beside that.
ROUNDING = 2 * torch.finfo(torch.float32).eps


def difference(peer: Peer, workload: Workload) -> str | None:
    """How it differs from ours after a few steps on small float32 tensors; None if by rounding alone.

    Args:
        workload: whose optimizer and options are taken.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform() -> torch.Tensor:
        return torch.empty(NUMEL).uniform_(-1, 1, generator=generator)

    small = Workload("", "", workload.optimizer, [(NUMEL,)], options=workload.options)
    params = [nn.Parameter(uniform())]
    copies = contestants.copy_params(_with_grad(params, uniform()), "matching")
    ours, theirs = contestants.ours(small, params), peer.build(small, copies)
    for _ in range(N_STEPS):
        # Other grads each time, or betas would not matter; small ones too, or eps would not.
        grad = uniform() * 10 ** (4 * uniform() - 4)
        for some, optimizer in ((params, ours), (copies, theirs)):
            _with_grad(some, grad)
            optimizer.step()
    bound = N_STEPS * ROUNDING
    found = (params[0].detach() - copies[0].detach()).abs().max().item()
    if found <= bound:  # a NaN is not
        return None
    return (
        f"computes something else: {found:.1e} apart after {N_STEPS} steps, rounding is {bound:.1e}"
    )


def refusal(peer: Peer, workload: Workload) -> str | None:
    """Why a peer's time would say nothing: it computes something else, or fails at that already.

    Those of small states have their own roundings, compiled code is torch.optim's.
    """
    if peer.formats or peer.compiles:
        return None
    try:
        return difference(peer, workload)
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _with_grad(params: list[nn.Parameter], grad: torch.Tensor) -> list[nn.Parameter]:
    for param in params:
        param.grad = grad.clone()
    return params
