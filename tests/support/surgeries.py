"""What people do to an optimizer between two steps, as a table of functions of a Run."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from support.cases import BACKEND, DEVICE
from support.twins import SHAPES, Run, begun


@dataclass(frozen=True)
class Surgery:
    """`served` names the backend of every tensor in the steps that follow; None where it may vary."""

    id: str
    operate: Callable[[Run], None]
    served: str | None


SURGERIES: list[Surgery] = []


def surgery(served: str | None = BACKEND) -> Callable:
    def register(operate: Callable[[Run], None]) -> Callable[[Run], None]:
        SURGERIES.append(Surgery(operate.__name__.replace("_", " "), operate, served))
        return operate

    return register


def has_states(run: Run, param: Tensor) -> bool:
    """As in torch.optim: those that a skipped first step leaves on a device do not count."""
    states = run.opt.state.get(param)
    return states is not None and begun(states) is states


def tensors_of(
    run: Run, key_filter: Callable[[str], bool] = lambda key: True
) -> Iterator[tuple[dict, str, Tensor]]:
    """(inner state dict, key, tensor) of every state tensor."""
    for group in run.opt.param_groups:
        for param in group["params"]:
            for key, value in list(run.opt.state.get(param, {}).items()):
                if torch.is_tensor(value) and key_filter(key):
                    yield run.opt.state[param], key, value


def not_step(key: str) -> bool:
    return key != "step"


@surgery()
def new_param_data(run: Run) -> None:
    for param in run.params:
        param.data = param.data.clone()


@surgery()
def param_data_in_another_layout(run: Run) -> None:
    run.params[1].data = run.params[1].data.t().contiguous().t()
    run.params[4].data = run.params[4].data.contiguous(memory_format=torch.channels_last)


@surgery(served=None)
def module_double(run: Run) -> None:
    module = nn.ParameterList(run.params)
    module.double()
    run.params = list(module)


@surgery(served=None)
def module_half(run: Run) -> None:
    module = nn.ParameterList(run.params)
    module.bfloat16()
    run.params = list(module)


@surgery()
def module_there_and_back(run: Run) -> None:
    module = nn.ParameterList(run.params)
    module.double().float()
    run.params = list(module)


@surgery()
def swapped_parameter_with_its_state(run: Run) -> None:
    # Gaussian splatting, when it resets an attribute.
    old = run.params[1]
    new = nn.Parameter(run.randn(old))
    if old in run.opt.state:
        run.opt.state[new] = run.opt.state.pop(old)
    run.opt.param_groups[0]["params"][1] = new
    run.params[1] = new


@surgery()
def densified_parameter(run: Run) -> None:
    # Gaussian splatting, when it adds points: param and state are extended.
    old = run.params[1]
    new = nn.Parameter(torch.cat([old.data, run.randn((4, 5), old.dtype)]))
    state = run.opt.state.pop(old, None)
    if state is not None:
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim():
                state[key] = torch.cat([value, value.new_zeros(4, 5)])
        run.opt.state[new] = state
    run.opt.param_groups[0]["params"][1] = new
    run.params[1] = new


@surgery()
def pruned_parameter(run: Run) -> None:
    old = run.params[1]
    keep = torch.arange(old.shape[0], device=DEVICE) % 3 == 0
    new = nn.Parameter(old.data[keep])
    state = run.opt.state.pop(old, None)
    if state is not None:
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim():
                state[key] = value[keep]
        run.opt.state[new] = state
    run.opt.param_groups[0]["params"][1] = new
    run.params[1] = new


@surgery()
def parameter_without_its_state(run: Run) -> None:
    run.params[1] = nn.Parameter(run.randn(run.params[1]))
    run.opt.param_groups[0]["params"][1] = run.params[1]


@surgery()
def new_state_tensors(run: Run) -> None:
    for state, key, value in tensors_of(run):
        state[key] = value.clone() * 0.5 if not_step(key) else value.clone()


@surgery()
def new_state_data(run: Run) -> None:
    # The well-known snippet that moves an optimizer to a device.
    for _, _, value in tensors_of(run):
        value.data = value.data.clone()


@surgery()
def state_written_in_place(run: Run) -> None:
    for _, _, value in tensors_of(run, not_step):
        value.mul_(0.25)


@surgery()
def state_in_another_layout(run: Run) -> None:
    for state, key, value in tensors_of(run, not_step):
        if value.dim() == 2:
            state[key] = value.t().contiguous().t()
        if value.dim() == 4:
            value.data = value.data.contiguous(memory_format=torch.channels_last)


@surgery()
def state_views_of_a_larger_tensor(run: Run) -> None:
    for state, key, value in tensors_of(run, not_step):
        if value.dim() == 2:
            state[key] = torch.cat([value, value], 1)[:, : value.shape[1]]


@surgery()
def state_on_swapped_storages(run: Run) -> None:
    for _, _, value in tensors_of(run, not_step):
        value.set_(torch.full_like(value, 0.5))


@surgery()
def inner_dicts_replaced(run: Run) -> None:
    for param in run.params:
        if param in run.opt.state:
            run.opt.state[param] = dict(run.opt.state[param])


@surgery()
def inner_dicts_reordered(run: Run) -> None:
    for param in run.params:
        if has_states(run, param):
            run.opt.state[param] = dict(reversed(run.opt.state[param].items()))


@surgery()
def state_reordered(run: Run) -> None:
    items = list(run.opt.state.items())
    run.opt.state.clear()
    run.opt.state.update(reversed(items))


@surgery()
def state_of_strangers(run: Run) -> None:
    run.opt.state["a note"] = {"anything": 1}
    run.opt.state[torch.zeros(3)] = {"step": torch.tensor(1.0)}


@surgery()
def user_keys_in_state(run: Run) -> None:
    for param in run.params:
        if has_states(run, param):
            run.opt.state[param]["my_mask"] = torch.ones(3, device=DEVICE)


@surgery()
def emptied_inner_dict(run: Run) -> None:
    if run.params[1] in run.opt.state:
        run.opt.state[run.params[1]].clear()


@surgery()
def one_state_deleted(run: Run) -> None:
    run.opt.state.pop(run.params[1], None)


@surgery()
def fresh_defaultdict(run: Run) -> None:
    run.opt.state = defaultdict(dict)


@surgery()
def cleared_state(run: Run) -> None:
    run.opt.state.clear()


@surgery()
def deleted_group(run: Run) -> None:
    run.opt.add_param_group({"params": [nn.Parameter(run.randn((4,), run.params[0].dtype))]})
    run.step()
    del run.opt.param_groups[0]


@surgery()
def deleted_param(run: Run) -> None:
    del run.opt.param_groups[0]["params"][1]


@surgery()
def reversed_params(run: Run) -> None:
    run.opt.param_groups[0]["params"].reverse()


@surgery()
def replaced_params_list(run: Run) -> None:
    run.opt.param_groups[0]["params"] = list(run.params[2:]) + list(run.params[:2])


@surgery()
def tuple_of_params(run: Run) -> None:
    run.opt.param_groups[0]["params"] = tuple(run.params)


@surgery()
def replaced_groups_list(run: Run) -> None:
    group = run.opt.param_groups[0]
    run.opt.param_groups = [
        {**group, "params": run.params[:2]},
        {**group, "params": run.params[2:], "lr": 0.5 * group["lr"]},
    ]


@surgery()
def groups_given_to_another_optimizer(run: Run) -> None:
    other = run.make([nn.Parameter(torch.zeros(2, device=DEVICE))])
    other.param_groups, other.state = run.opt.param_groups, run.opt.state
    run.opt = other


@surgery()
def frozen_param(run: Run) -> None:
    # It keeps its last grad, and stock steps it as long as it does.
    run.params[1].requires_grad_(False)


@surgery()
def own_grad_buffers(run: Run) -> None:
    for param in run.params:
        param.grad = torch.zeros_like(param)


@surgery()
def resized_param(run: Run) -> None:
    # Grown in place, its state with it.
    run.params[0].data.resize_(40).fill_(0.5)
    for _, _, value in tensors_of(run, not_step):
        if value.shape == SHAPES[0]:
            value.resize_(40).fill_(0.5)


@surgery()
def param_set_to_another_storage(run: Run) -> None:
    with torch.no_grad():
        run.params[1].set_(run.randn(run.params[1]))


@surgery()
def swapped_tensors(run: Run) -> None:
    torch.utils.swap_tensors(run.params[1], nn.Parameter(run.randn(run.params[1])))


@surgery()
def reloaded_checkpoint(run: Run) -> None:
    run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))


@surgery()
def deep_copied(run: Run) -> None:
    run.opt, run.params = copy.deepcopy((run.opt, run.params))


@surgery()
def step_counts_edited(run: Run) -> None:
    for _, _, value in tensors_of(run, lambda key: key == "step"):
        value.fill_(100.0)


@surgery(served=None)
def float64_step_counts(run: Run) -> None:
    for state, key, value in tensors_of(run, lambda key: key == "step"):
        state[key] = value.double()


@surgery(served=None)
def integer_step_counts(run: Run) -> None:
    for state, key, value in tensors_of(run, lambda key: key == "step"):
        state[key] = value.long()


@surgery(served=None)
def step_counts_that_are_numbers(run: Run) -> None:
    for state, key, value in tensors_of(run, lambda key: key == "step"):
        state[key] = value.item()


@surgery(served=None)
def one_element_step_counts(run: Run) -> None:
    for state, key, value in tensors_of(run, lambda key: key == "step"):
        state[key] = value.reshape(1)


@surgery(served=None)
def missing_state_key(run: Run) -> None:
    for state, key, _ in list(tensors_of(run)):
        state.pop(key, None)
        break


@surgery(served=None)
def state_key_set_to_none(run: Run) -> None:
    for state, key, _ in tensors_of(run, not_step):
        state[key] = None


def _option_switched(name: str, value: object) -> Surgery:
    def switch(run: Run) -> None:
        for group in run.opt.param_groups:
            if name in group:
                group[name] = value

    return Surgery(f"{name} switched to {value}", switch, None)


# Some of these need a state key that is not there: stock's KeyError, before anything is written.
SURGERIES += [
    _option_switched("amsgrad", True),
    _option_switched("amsgrad", False),
    _option_switched("centered", True),
    _option_switched("centered", False),
    _option_switched("momentum", 0.8),
    _option_switched("momentum", 0),
    _option_switched("capturable", True),
    _option_switched("differentiable", True),
    _option_switched("initial_accumulator_value", 3.0),
]
