"""State has stock's keys, layout and lifetime, and checkpoints go both ways."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from support.cases import DEVICE, ONE_EACH, Case
from support.marks import each_optimizer, each_state, few_cases, over
from support.program import SCALARS
from support.twins import SHAPES, Run, assert_same_groups, run_both


def state_tensors(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [
        value for state in opt.state.values() for value in state.values() if torch.is_tensor(value)
    ]


@each_state
@pytest.mark.parametrize("n_steps", [0, 1, 3])
def test_state_is_created_when_stock_creates_it(case: Case, n_steps: int) -> None:
    def program(run: Run) -> None:
        for _ in range(n_steps):
            run.set_grads()
            run.params[1].grad = None
            run.step_as_is()
        run.seen.append(len(run.opt.state))

    run_both(case, program)


def channels_last(run: Run) -> None:
    for param in run.params:
        if param.dim() == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)


def transposed(run: Run) -> None:
    for param in run.params:
        if param.dim() == 2:
            param.data = param.data.t().contiguous().t()


def sliced(run: Run) -> None:
    for param in run.params:
        if param.dim() == 2:
            param.data = torch.cat([param.data, param.data], 1)[:, : param.shape[1]]


def as_drawn(run: Run) -> None:
    pass


@few_cases
@pytest.mark.parametrize("lay_grads", [as_drawn, channels_last, transposed, sliced])
@pytest.mark.parametrize("lay_params", [as_drawn, channels_last, transposed, sliced])
def test_strides_are_stocks(case: Case, lay_params, lay_grads) -> None:
    # run_both compares the strides of every param and state tensor.
    def program(run: Run) -> None:
        lay_params(run)
        run.opt = run.make(run.params)
        for _ in range(2):
            grads = Run(case, run.build, extra=run.extra)
            lay_grads(grads)
            for param, grad in zip(run.params, grads.params):
                param.grad = grad.data
            run.step_as_is()

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_one_storage_per_state_tensor(case: Case) -> None:
    run = Run(case, case.fused)
    run.step(2)
    tensors = state_tensors(run.opt)
    # An empty tensor has a null storage, the same for all.
    storages = [t.untyped_storage() for t in tensors if t.numel()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert not tensor.requires_grad


@few_cases
def test_state_tensors_keep_their_identity(case: Case) -> None:
    run = Run(case, case.fused)
    run.step()
    before = [(id(t), t.data_ptr()) for t in state_tensors(run.opt)]
    held = state_tensors(run.opt)
    run.step(3)
    assert [(id(t), t.data_ptr()) for t in state_tensors(run.opt)] == before
    assert all(a is b for a, b in zip(held, state_tensors(run.opt)))


@few_cases
def test_state_does_not_alias_params_or_grads(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        grads = {p.grad.untyped_storage().data_ptr() for p in run.params if p.numel()}
        grads |= {p.untyped_storage().data_ptr() for p in run.params if p.numel()}
        for tensor in state_tensors(run.opt):
            assert tensor.numel() == 0 or tensor.untyped_storage().data_ptr() not in grads
        for param in run.params:
            param.grad.fill_(100.0)

    run_both(case, program)


@few_cases
def test_step_dtype_follows_the_default_dtype(case: Case) -> None:
    def program(run: Run) -> None:
        torch.set_default_dtype(torch.float64)
        try:
            run.opt = run.make(run.params)
            run.step(2)
        finally:
            torch.set_default_dtype(torch.float32)
        for state in run.opt.state.values():
            run.seen.extend(str(state[key].dtype) for key in state if key == "step")
        run.step(2)

    ours, _ = run_both(case, program, tensors={case.backend: len(SHAPES)})
    assert set(ours.seen) <= {"torch.float64"}


def through_nothing(value: dict) -> dict:
    return copy.deepcopy(value)


def through_torch_save(value: dict) -> dict:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_pickle(value: dict) -> dict:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("source", ["stock", "fused"])
@pytest.mark.parametrize("n_steps", [0, 1, 5])
@each_optimizer
def test_checkpoint_continues_like_the_uninterrupted_run(
    case: Case, source: str, n_steps: int
) -> None:
    save = through_torch_save if n_steps == 5 else through_nothing

    def continued(run: Run) -> None:
        # Saved by one of the two and loaded into the run's own class.
        first = Run(case, getattr(case, source))
        first.step(n_steps)
        run.params = [torch.nn.Parameter(p.detach().clone()) for p in first.params]
        run.opt = run.make(run.params)
        run.opt.load_state_dict(save(first.opt.state_dict()))
        run.generator = first.generator
        run.n_steps = n_steps
        run.step(3)

    ours, _ = run_both(case, continued, tensors={case.backend: len(SHAPES)})
    uninterrupted = Run(case, case.stock)
    uninterrupted.step(n_steps + 3)
    assert_same_groups(ours.opt, uninterrupted.opt, n_steps + 3, torch.float32)


@each_optimizer
def test_state_dict_has_stocks_structure(case: Case) -> None:
    def structure(value: object) -> object:
        if isinstance(value, dict):
            return {key: structure(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [structure(item) for item in value]
        return type(value).__name__

    def program(run: Run) -> None:
        run.step(2)
        run.seen.append(structure(run.opt.state_dict()))

    run_both(case, program, foreach=False)


@few_cases
def test_saved_file_is_no_larger_than_stocks(case: Case) -> None:
    def program(run: Run) -> None:
        run.step(2)
        for save in (lambda: run.opt.state_dict(), lambda: run.opt.state_dict()["state"]):
            file = io.BytesIO()
            torch.save(save(), file)
            run.seen.append(len(file.getvalue()))

    run_both(case, program, foreach=False)


@few_cases
@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle], ids=["deepcopy", "pickle"])
def test_copies_of_the_optimizer_continue(case: Case, clone) -> None:
    def program(run: Run) -> None:
        run.step(2)
        original, original_params = run.opt, run.params
        run.opt, run.params = clone((run.opt, run.params))
        run.step(2)
        # The original neither notices the copy's steps nor lends it its pointers.
        run.seen.extend(p.detach().clone() for p in original_params)
        original.step()
        run.seen.extend(p.detach().clone() for p in original_params)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_copy_made_before_the_first_step_continues(case: Case) -> None:
    def program(run: Run) -> None:
        run.opt, run.params = copy.deepcopy((run.opt, run.params))
        run.step(2)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_loading_replaces_hypers(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        other = run.make(run.params, lr=0.04)
        run.opt.load_state_dict(other.state_dict())
        assert run.opt.param_groups[0]["lr"] == 0.04
        run.step(2)

    run_both(case, program)


@few_cases
def test_loading_midway_goes_back(case: Case) -> None:
    def program(run: Run) -> None:
        run.step(2)
        saved = copy.deepcopy(run.opt.state_dict())
        run.step(2)
        run.opt.load_state_dict(saved)
        run.step(2)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@over([case for case in ONE_EACH if case.optimizer in ("NAdam", "ASGD")])
def test_loading_keeps_the_precision_of_numbers_among_the_states(case: Case) -> None:
    """torch.optim would round them to bfloat16 with the states, and so the learning rate, say."""
    params = [torch.nn.Parameter(torch.ones(7, dtype=torch.bfloat16, device=DEVICE))]
    opt, twin, stock = case.fused(params), case.fused(params), case.stock(params)
    params[0].grad = torch.ones_like(params[0])
    opt.step()
    for other in (twin, stock):
        other.load_state_dict(opt.state_dict())
    saved, loaded, rounded = (each.state[params[0]] for each in (opt, twin, stock))
    for key in SCALARS & saved.keys():
        assert loaded[key].dtype == torch.float32 and loaded[key].device == saved[key].device
        assert torch.equal(loaded[key], saved[key])
    assert torch.bfloat16 in {rounded[key].dtype for key in SCALARS & saved.keys()}
    twin.load_state_dict(stock.state_dict())
    twin.step()
    assert not twin.last_step.fallbacks


@few_cases
def test_loading_without_a_copy_shares_the_tensors(case: Case) -> None:
    # load_state_dict does not copy tensors that already fit: two optimizers then write the same state.
    def program(run: Run) -> None:
        run.step(2)
        twin = run.make(run.params)
        twin.load_state_dict(run.opt.state_dict())
        run.step()
        run.set_grads()
        twin.step()
        run.n_steps += 1
        run.step()

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_loading_casts_to_the_params_dtype(case: Case) -> None:
    def program(run: Run) -> None:
        narrow = Run(case, run.build, extra=run.extra)
        narrow.step(2)
        run.opt.load_state_dict(narrow.opt.state_dict())
        run.dtype = narrow.dtype
        run.step(2)

    ours, _ = run_both(case, program, dtype=torch.float64, tensors={case.backend: len(SHAPES)})
    dtypes = {
        value.dtype
        for state in ours.opt.state.values()
        for key, value in state.items()
        if key != "step" and torch.is_tensor(value)
    }
    assert dtypes <= {torch.float64}


@few_cases
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_flags_of_a_stock_checkpoint_arrive_and_are_harmless(case: Case, flag: str) -> None:
    def program(run: Run) -> None:
        run.step(2)
        saved = copy.deepcopy(run.opt.state_dict())
        if flag in saved["param_groups"][0]:
            saved["param_groups"][0][flag] = True
        run.opt.load_state_dict(saved)
        for group in run.opt.param_groups:
            # Only ours is to serve these flags; the reference stays on its for-loop.
            if not run.is_ours and flag in group:
                group[flag] = False
        run.step(2)

    run_both(case, program, tensors={case.backend: len(SHAPES)})


@few_cases
def test_setstate_fills_missing_keys_and_number_steps(case: Case) -> None:
    def program(run: Run) -> None:
        run.step(2)
        state = run.opt.__getstate__()
        for group in state["param_groups"]:
            for key in ("maximize", "foreach", "differentiable", "capturable", "fused"):
                group.pop(key, None)
        for inner in state["state"].values():
            if "step" in inner:
                inner["step"] = 2
        run.opt.__setstate__(state)
        run.step(2)

    tensors = None if "maximize=True" in case.id else {case.backend: len(SHAPES)}
    run_both(case, program, tensors=tensors)


@few_cases
def test_checkpoint_hooks(case: Case) -> None:
    def program(run: Run) -> None:
        run.opt.register_state_dict_pre_hook(lambda opt: run.seen.append("save pre"))
        run.opt.register_state_dict_post_hook(lambda opt, saved: {**saved, "extra": 1})
        run.opt.register_load_state_dict_pre_hook(
            lambda opt, saved: run.seen.append(saved["extra"])
        )
        run.opt.register_load_state_dict_post_hook(lambda opt: run.seen.append("load post"))
        run.step()
        run.opt.load_state_dict(copy.deepcopy(run.opt.state_dict()))
        run.step()

    ours, _ = run_both(case, program)
    assert ours.seen == ["save pre", 1, "load post"]


@each_optimizer
def test_checkpoint_that_does_not_fit_raises_as_stock(case: Case) -> None:
    def program(run: Run) -> None:
        run.step()
        run.opt.load_state_dict(run.make(run.params[:1]).state_dict())

    ours, stock = run_both(case, program)
    assert str(ours.error) == str(stock.error) != "None"


@each_optimizer
def test_share_memory_exists_where_stock_has_it(case: Case) -> None:
    def program(run: Run) -> None:
        if hasattr(run.opt, "share_memory"):
            run.opt.share_memory()
            run.seen.extend(t.is_shared() for t in state_tensors(run.opt))
        run.step(2)

    run_both(case, program, tensors={case.backend: len(SHAPES)})
