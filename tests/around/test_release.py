"""release_gradients: the same bits as the ordinary loop, and no grad outlives its bucket."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fused_optim
from fused_optim import buckets, release_gradients
from fused_optim.step import step_groups
from support.cases import BACKEND, DEVICE, ONE_EACH, Case
from support.marks import each_optimizer, few_cases

# Of the 600 elements of Model: each param by itself, a few at a time, all at the end.
all_bucket_sizes = pytest.mark.parametrize("bucket_numel", [1, 150, 10**6])


class Model(nn.Module):
    """Tied weights, a layer used twice, one used in some iterations only, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.twice = nn.Linear(8, 8)
        self.sometimes = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, iteration: int) -> Tensor:
        hidden = self.twice(torch.tanh(self.twice(self.embedding(tokens))))
        if iteration % 3 == 1:
            hidden = hidden + self.sometimes(hidden)
        return self.head(self.norm(self.frozen(hidden)))


class Loop:
    """A training loop over Model; `released` are the arguments of release_gradients, if it is called."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32, **released: int) -> None:
        torch.manual_seed(0)
        self.model = Model().to(DEVICE, dtype)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        self.opt = case.fused([{"params": matrices}, {"params": vectors, "lr": 0.03}])
        self.released = released
        self.handle = release_gradients(self.model, self.opt, **released) if released else None
        self.iteration = 0
        self.generator = torch.Generator().manual_seed(1)

    def loss(self) -> Tensor:
        tokens = torch.randint(13, (5, 4), generator=self.generator).to(DEVICE)
        return self.model(tokens, self.iteration).float().square().mean()

    def run(self, n_iterations: int = 4, n_backwards: int = 1) -> "Loop":
        for _ in range(n_iterations):
            for _ in range(n_backwards):
                self.loss().backward()
            self.opt.step()
            self.opt.zero_grad()
            self.iteration += 1
        return self


def assert_same_bits(released: Loop, ordinary: Loop) -> None:
    for name, param in ordinary.model.named_parameters():
        assert torch.equal(released.model.get_parameter(name), param), name
    ours, expected = released.opt.state_dict(), ordinary.opt.state_dict()
    assert ours["param_groups"] == expected["param_groups"]
    assert set(ours["state"]) == set(expected["state"])
    for index, state in expected["state"].items():
        assert list(ours["state"][index]) == list(state)
        for key, value in state.items():
            assert torch.equal(ours["state"][index][key], value), (index, key)


@few_cases
def test_same_bits(case: Case) -> None:
    assert_same_bits(Loop(case, bucket_numel=150).run(), Loop(case).run())


@few_cases
@all_bucket_sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_of_buckets(case: Case, bucket_numel: int, dtype: torch.dtype) -> None:
    ordinary = Loop(case, dtype)
    released = Loop(case, dtype, bucket_numel=bucket_numel)
    for loop in (released, ordinary):
        loop.run()
    assert_same_bits(released, ordinary)
    assert released.opt.last_step == ordinary.opt.last_step


@each_optimizer
@all_bucket_sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulation(case: Case, bucket_numel: int, dtype: torch.dtype) -> None:
    ordinary = Loop(case, dtype)
    released = Loop(case, dtype, bucket_numel=bucket_numel, accumulation_steps=3)
    for loop in (released, ordinary):
        loop.run(2, n_backwards=3)
        loop.run(1, n_backwards=2)  # the last batches of an epoch: step() does it
        loop.run(2, n_backwards=3)
        loop.loss().backward()
        loop.opt.zero_grad()  # begins anew
        loop.run(1, n_backwards=3)
    assert_same_bits(released, ordinary)
    assert released.opt.last_step == ordinary.opt.last_step


@each_optimizer
def test_schedulers_and_hooks_of_step(case: Case) -> None:
    def train(**released: int) -> tuple[Loop, list]:
        loop, seen = Loop(case, **released), []
        loop.opt.register_step_pre_hook(lambda *_: seen.append("before"))
        loop.opt.register_step_post_hook(lambda opt, *_: seen.append(opt.last_step))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(loop.opt, 0.5)
        for _ in range(4):
            loop.run(1)
            scheduler.step()
            seen.append(scheduler.get_last_lr())
        return loop, seen

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        released, seen = train(bucket_numel=150)
    ordinary, expected = train()
    assert seen == expected
    assert_same_bits(released, ordinary)


@each_optimizer
def test_checkpoint_in_the_middle(case: Case) -> None:
    def resume(saved: Loop, **released: int) -> Loop:
        loop = Loop(case, **released)
        loop.run(1)  # something to be overwritten
        loop.model.load_state_dict(copy.deepcopy(saved.model.state_dict()))
        loop.opt.load_state_dict(copy.deepcopy(saved.opt.state_dict()))
        loop.iteration = saved.iteration
        loop.generator.set_state(saved.generator.get_state())
        return loop.run(3)

    released = resume(Loop(case, bucket_numel=150).run(2), bucket_numel=150)
    assert_same_bits(released, Loop(case).run(5))
    # And across: what one has saved the other goes on with.
    assert_same_bits(resume(Loop(case, bucket_numel=150).run(2)), Loop(case).run(5))
    assert_same_bits(resume(Loop(case).run(2), bucket_numel=150), Loop(case).run(5))


@each_optimizer
def test_copies_have_no_hooks(case: Case) -> None:
    loop = Loop(case, bucket_numel=1).run(1)
    for make in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        model, opt = make((loop.model, loop.opt))
        model(torch.zeros(2, dtype=torch.long, device=DEVICE), 0).sum().backward()
        assert model.norm.weight.grad is not None
        release_gradients(model, opt).remove()


@each_optimizer
def test_closure(case: Case) -> None:
    def train(**released: int) -> Loop:
        loop = Loop(case, **released)

        def closure() -> Tensor:
            loop.opt.zero_grad()
            loss = loop.loss()
            loss.backward()
            return loss

        for _ in range(3):
            assert loop.opt.step(closure).item() > 0
        return loop

    assert_same_bits(train(bucket_numel=150), train())


@each_optimizer
def test_remove_makes_everything_as_before(case: Case) -> None:
    ordinary, released = Loop(case).run(4), Loop(case, bucket_numel=150).run(2)
    attributes = set(ordinary.opt.__dict__)
    released.handle.remove()
    released.handle.remove()
    assert set(released.opt.__dict__) == attributes
    released.loss().backward()
    assert released.model.norm.weight.grad is not None
    released.opt.step()
    released.opt.zero_grad()
    released.iteration += 1
    with release_gradients(released.model, released.opt) as handle:
        released.run(1)
    assert_same_bits(released, ordinary)
    handle.remove()
    assert set(released.opt.__dict__) == attributes


def test_remove_restores_what_the_program_has_set() -> None:
    for value in (True, False):
        loop = Loop(ONE_EACH[0])
        loop.opt._step_supports_amp_scaling = value
        release_gradients(loop.model, loop.opt).remove()
        assert loop.opt._step_supports_amp_scaling is value


def test_remove_between_backward_and_step() -> None:
    ordinary = Loop(ONE_EACH[0]).run(2, n_backwards=2)
    released = Loop(ONE_EACH[0], accumulation_steps=2).run(1, n_backwards=2)
    released.loss().backward()
    released.handle.remove()
    released.loss().backward()
    released.opt.step()
    assert_same_bits(released, ordinary)


def linear(n_layers: int = 4) -> tuple[nn.Sequential, fused_optim.AdamW]:
    """Layers of one param with 25 elements."""
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(n_layers))).to(DEVICE)
    return model, fused_optim.AdamW(model.parameters())


def backward(model: nn.Module) -> None:
    model(torch.ones(3, 5, device=DEVICE)).sum().backward()


def watch(model: nn.Module) -> list[int]:
    """How many grads there are whenever one is complete, before the handle's hook sees it."""
    seen: list[int] = []
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(
            lambda _: seen.append(sum(p.grad is not None for p in model.parameters()))
        )
    return seen


@pytest.mark.parametrize(
    ("bucket_numel", "expected"), [(1, [1, 1, 1, 1]), (25, [1, 1, 1, 1]), (26, [1, 2, 1, 2])]
)
def test_grads_are_freed_in_the_backward(bucket_numel: int, expected: list[int]) -> None:
    model, opt = linear()
    seen = watch(model)
    release_gradients(model, opt, bucket_numel=bucket_numel)
    for _ in range(2):
        seen.clear()
        backward(model)
        assert seen == expected
        assert all(param.grad is None for param in model.parameters())
        opt.step()
        assert opt.last_step.tensors == {BACKEND: 4}


def test_one_kernel_call_for_each_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = linear(5)
    calls = []

    def count(optimizer: object, groups: list[dict], keeper: object) -> object:
        calls.append(sum(len(group["params"]) for group in groups))
        return step_groups(optimizer, groups, keeper)

    monkeypatch.setattr(buckets, "step_groups", count)
    release_gradients(model, opt, bucket_numel=50)
    for _ in range(2):
        calls.clear()
        backward(model)
        assert calls == [2, 2, 1]
        opt.step()


@pytest.mark.parametrize("bucket_numel", [1, 26, 10**6])
def test_hooks_of_the_program_before_and_behind(bucket_numel: int) -> None:
    def train(releases: bool) -> tuple[list, list]:
        torch.manual_seed(0)
        model, opt = linear()
        params, norms = list(model.parameters()), []

        def halve(param: Tensor) -> None:
            param.grad.mul_(0.5)
            norms.append(param.grad.norm().item())

        params[0].register_hook(lambda grad: grad.clamp(-0.1, 0.1))
        for param in params[:2]:
            param.register_post_accumulate_grad_hook(halve)
        if releases:
            release_gradients(model, opt, bucket_numel=bucket_numel)
        for param in params[1:]:
            param.register_post_accumulate_grad_hook(halve)
        for _ in range(3):
            backward(model)
            opt.step()
            opt.zero_grad()
        return params, norms

    params, norms = train(True)
    expected, expected_norms = train(False)
    assert norms == expected_norms
    assert all(torch.equal(param, other) for param, other in zip(params, expected))


def test_params_without_hook_are_stepped_by_step() -> None:
    model, opt = linear()
    model[0].requires_grad_(False)
    release_gradients(model, opt, bucket_numel=1)
    model[0].requires_grad_(True)
    added = nn.Linear(5, 5, bias=False).to(DEVICE)
    opt.add_param_group({"params": added.parameters()})
    model.append(added)
    before = [param.clone() for param in model.parameters()]
    backward(model)
    assert [param.grad is None for param in model.parameters()] == [False, True, True, True, False]
    opt.step()
    assert not any(torch.equal(param, b) for param, b in zip(model.parameters(), before))
    assert opt.last_step.tensors == {BACKEND: 5}
    opt.zero_grad()
    backward(model)
    opt.step()


def test_params_taken_out_of_the_optimizer_keep_their_grads() -> None:
    model, opt = linear()
    release_gradients(model, opt, bucket_numel=1)
    taken = opt.param_groups[0]["params"].pop(1)
    before = taken.clone()
    backward(model)
    opt.step()
    assert torch.equal(taken, before) and taken.grad is not None
    assert opt.last_step.tensors == {BACKEND: 3}


@pytest.mark.parametrize("bucket_numel", [1, 10**6])
def test_sparse_grads_fall_back(bucket_numel: int) -> None:
    def train(releases: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)).to(DEVICE)
        groups = [{"params": model[1].weight}, {"params": [model[1].bias, model[0].weight]}]
        opt = fused_optim.SGD(groups, lr=0.1)
        if releases:
            release_gradients(model, opt, bucket_numel=bucket_numel)
        for _ in range(2):
            model(torch.tensor([1, 3, 3], device=DEVICE)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return model, opt

    (model, opt), (ordinary, expected) = train(True), train(False)
    assert opt.last_step == expected.last_step
    assert [(f.group, f.index) for f in opt.last_step.fallbacks] == [(1, 1)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ordinary.parameters()))


def test_several_losses_with_params_of_their_own() -> None:
    model, opt = linear(2)
    release_gradients(model, opt, bucket_numel=1)
    for _ in range(2):
        for layer in model:
            layer.weight.square().sum().backward()
        opt.step()
        assert opt.last_step.tensors == {BACKEND: 2}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(use_reentrant: bool) -> None:
    def train(releases: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model, opt = linear()
        if releases:
            release_gradients(model, opt, bucket_numel=26)
        for _ in range(3):
            x = torch.ones(3, 5, device=DEVICE, requires_grad=True)
            x = checkpoint(model[:2], x, use_reentrant=use_reentrant)
            model[2:](x).sum().backward()
            opt.step()
            opt.zero_grad()
        return list(model.parameters())

    assert all(torch.equal(p, q) for p, q in zip(train(True), train(False)))


def test_backward_in_another_thread() -> None:
    ordinary, released = Loop(ONE_EACH[0]).run(3), Loop(ONE_EACH[0], bucket_numel=150)
    for _ in range(3):
        thread = threading.Thread(target=lambda: released.loss().backward())
        thread.start()
        thread.join()
        assert released.model.norm.weight.grad is None
        released.opt.step()
        released.iteration += 1
    assert_same_bits(released, ordinary)
