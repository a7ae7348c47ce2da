"""Programs with an optimizer inside of what torch.compile compiles, run compiled and as they are."""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

import fused_optim
from support.cases import DEVICE

Make = Callable[..., Optimizer]
Compile = Callable[[Callable], Callable]


def _tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, bias, batch = (
        torch.randn(shape, generator=generator).to(DEVICE) for shape in ((10, 5), (10,), (5,))
    )
    return torch.nn.Parameter(weight), torch.nn.Parameter(bias), batch


def _loss(weight: Tensor, bias: Tensor, batch: Tensor) -> Tensor:
    return (weight.mv(batch) + bias).square().sum()


def _backward(optimizer: Optimizer, *tensors: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = _loss(*tensors)
    loss.backward()
    return loss


def made_and_handed_out(make: Make, compiles: Compile) -> list[Tensor]:
    tensors = _tensors()

    @compiles
    def build(weight: Tensor, bias: Tensor, batch: Tensor):
        optimizer = make([weight, bias])
        return optimizer, functools.partial(_backward, optimizer, weight, bias, batch)

    optimizer, closure = build(*tensors)
    for _ in range(3):
        optimizer.step(closure)
    return [*tensors]


def made_and_stepped(make: Make, compiles: Compile) -> list[Tensor]:
    tensors = _tensors()

    @compiles
    def train(weight: Tensor, bias: Tensor, batch: Tensor) -> Tensor:
        optimizer = make([weight, bias])
        for _ in range(3):
            loss = _backward(optimizer, weight, bias, batch)
            optimizer.step()
        return loss

    return [train(*tensors), train(*tensors), *tensors]


def saved_and_loaded(make: Make, compiles: Compile) -> list[Tensor]:
    tensors = _tensors()

    @compiles
    def train(weight: Tensor, bias: Tensor, batch: Tensor):
        optimizer = make([weight, bias])
        _backward(optimizer, weight, bias, batch)
        optimizer.step()
        saved = optimizer.state_dict()
        other = make([weight, bias])
        other.load_state_dict(saved)
        _backward(other, weight, bias, batch)
        other.step()
        return saved, other.state_dict()

    saved = train(*tensors)
    states = [state for one in saved for state in one["state"].values()]
    return [*tensors, *(value for state in states for value in state.values())]


def closure_inside(make: Make, compiles: Compile) -> list[Tensor]:
    tensors = _tensors()
    optimizer = make([{"params": [tensors[0]]}, {"params": [tensors[1]], "lr": 0.5}])

    @compiles
    def step() -> Tensor:
        return optimizer.step(lambda: _backward(optimizer, *tensors))

    return [step(), step(), *tensors]


def step_alone(make: Make, compiles: Compile) -> list[Tensor]:
    tensors = _tensors()
    optimizer = make([*tensors[:2]])
    step = compiles(optimizer.step)
    for _ in range(3):
        _backward(optimizer, *tensors)
        step()
    return [*tensors]


def tensor_that_requires_grad(make: Make, compiles: Compile) -> list[Tensor]:
    weight, bias, batch = (tensor.detach() for tensor in _tensors())
    weight.requires_grad_()
    optimizer = make([weight])

    @compiles
    def train(optimizer: Optimizer, **tensors: Tensor) -> Tensor:
        loss = _backward(optimizer, *tensors.values())
        optimizer.step()
        return loss

    losses = [train(optimizer, weight=weight, bias=bias, batch=batch) for _ in range(2)]
    return [*losses, weight]


def group_added(make: Make, compiles: Compile) -> list[Tensor]:
    tensors = _tensors()
    seen: list[int] = []

    @compiles
    def train(weight: Tensor, bias: Tensor, batch: Tensor) -> Optimizer:
        optimizer = make([("weight", weight)])
        optimizer.add_param_group({"params": [("bias", bias)]})
        optimizer.register_step_post_hook(lambda *_: seen.append(1))
        _backward(optimizer, weight, bias, batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return optimizer

    optimizer = train(*tensors)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight"], ["bias"]]
    return [*tensors, torch.tensor(len(seen))]


def kind_of_param(make: Make, compiles: Compile) -> list[Tensor]:
    """Complex params, which no kernel serves, after others."""
    params = []
    for dtype in (torch.float32, torch.complex64):
        param = torch.nn.Parameter(_tensors()[0].detach().to(dtype), requires_grad=False)
        param.grad = param.detach() * 2
        compiles(make([param]).step)()
        params.append(param)
    return params


PROGRAMS = (
    made_and_handed_out,  # first: no optimizer of the class has been made before
    made_and_stepped,
    saved_and_loaded,
    closure_inside,
    step_alone,
    tensor_that_requires_grad,
    group_added,
    kind_of_param,
)


def own_options(make: Make, compiles: Compile) -> list[Tensor]:
    tensors = _tensors()

    @compiles
    def train(weight: Tensor, bias: Tensor, batch: Tensor) -> list[Tensor]:
        optimizer = make([weight, bias], max_grad_norm=1.0, ema_decay=0.5, state_dtype="int8")
        for _ in range(2):
            _backward(optimizer, weight, bias, batch)
            optimizer.step()
        optimizer.explain()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.load_state_dict(optimizer.state_dict_for_stock())
        optimizer.load_master_params(optimizer.master_params())
        with optimizer.swapped_ema():
            loss = _loss(weight, bias, batch)
        return [loss, *optimizer.ema_params(), optimizer.grad_norm, optimizer.skipped_steps]

    return [*train(*tensors), *tensors]


def check(name: str, patched: bool) -> None:
    """Each program does the same compiled, with the class of this name or with torch.optim's, patched."""
    print(name, flush=True)
    if patched:
        fused_optim.patch()
    make = getattr(torch.optim if patched else fused_optim, name)
    made: list[Optimizer] = []

    def interpreted(*args, **options) -> Optimizer:
        made.append(make(*args, **options))
        return made[-1]

    programs = PROGRAMS if patched else (*PROGRAMS, own_options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = []
        for program in programs:
            torch.compiler.reset()
            compiled.append(program(make, torch.compile(backend="eager")))
    told = [str(one.message) for one in caught]
    assert not [text for text in told if "Dynamo" in text], told
    for program, values in zip(programs, compiled):
        expected = program(interpreted, lambda function: function)
        assert len(values) == len(expected) and all(map(torch.equal, values, expected)), program
    assert {type(optimizer) for optimizer in made} == {getattr(fused_optim, name)}
