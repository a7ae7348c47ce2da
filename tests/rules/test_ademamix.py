"""AdEMAMix goes on from a checkpoint as the authors' class writes it."""

import copy

import pytest
import torch
from torch import nn

from fused_optim import AdEMAMix, plain


@pytest.mark.parametrize("ours", [AdEMAMix, plain.AdEMAMix], ids=["kernels", "plain"])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_goes_on_from_a_checkpoint_of_the_authors(ours: type, beta1: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def step(optimizer: torch.optim.Optimizer, grads: list[torch.Tensor]) -> None:
        for grad in grads:
            optimizer.param_groups[0]["params"][0].grad = grad.clone()
            optimizer.step()

    grads = [torch.randn(33, generator=generator) for _ in range(5)]
    options = {"betas": (beta1, 0.99, 0.999), "alpha": 2.0}
    whole = ours([nn.Parameter(torch.ones(33))], **options)
    step(whole, grads[:3])
    (param,) = whole.param_groups[0]["params"]
    other = ours([nn.Parameter(param.detach().clone())], **options)

    states = copy.deepcopy(whole.state[param])
    states["step"] = 3
    if beta1 == 0:
        states["exp_avg_fast"] = None
    group = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, **options, "params": [0]}
    group |= {"alpha_warmup": None, "beta3_warmup": None}
    other.load_state_dict({"state": {0: states}, "param_groups": [group]})
    step(whole, grads[3:])
    step(other, grads[3:])
    assert torch.equal(param, other.param_groups[0]["params"][0])
    if ours is AdEMAMix:
        assert not other.last_step.fallbacks
