"""Whether two contestants compute the same: else their times would be those of different things."""

import torch
from torch import Tensor, nn

from fused_optim.bench import contestants
from fused_optim.bench.peers import Peer
from fused_optim.bench.workloads import Workload

N_STEPS = 3
NUMEL = 4096
# Per step, of a param of size 1: two implementations round the decay and the update, each at most half a
# unit. Their updates are of size lr, 1e-3, and roundings in them vanish beside that.
ROUNDING = 2 * torch.finfo(torch.float32).eps


class Disagreement(Exception):
    """Two contestants do not compute the same."""


def expect_near(what: str, theirs: Tensor, own: Tensor, bound: float) -> None:
    """Raise Disagreement if some elements are further apart."""
    if own.numel() == 0:
        return
    difference = (theirs.detach() - own.detach()).abs().max().item()
    if not difference <= bound:  # a NaN is outside
        raise Disagreement(f"{what} differs by {difference:.2g}, roundings explain {bound:.2g}")


def compare(peer: Peer, workload: Workload) -> None:
    """Raise Disagreement if a peer and ours are apart after a few steps on small float32 tensors.

    Args:
        workload: whose optimizer and options are taken.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform() -> Tensor:
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
    expect_near("the param", copies[0], params[0], N_STEPS * ROUNDING)


def refusal(peer: Peer, workload: Workload) -> str | None:
    """Why a peer's time would say nothing: it computes something else, or fails at that already.

    Those of small states have their own roundings, compiled code is torch.optim's.
    """
    if peer.formats or peer.compiles:
        return None
    try:
        return compare(peer, workload)
    except Disagreement as difference:
        return f"computes something else: {difference}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"


def _with_grad(params: list[nn.Parameter], grad: torch.Tensor) -> list[nn.Parameter]:
    for param in params:
        param.grad = grad.clone()
    return params
