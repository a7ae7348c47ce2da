"""Every kind of grad: served right, refused as stock refuses it, never half written."""

import struct

import pytest
import torch
from torch import Tensor

import fused_optim
from support.cases import DEVICE, STOCK_SHAPES, Case
from support.marks import each_optimizer, each_state, few_cases
from support.twins import SHAPES, Run, assert_untouched, run_both, snapshot


@few_cases
def test_none_grads_come_and_go(case: Case) -> None:
    def program(run: Run) -> None:
        for i in range(6):
            run.set_grads()
            run.params[i % len(run.params)].grad = None
            run.params[4].grad = None
            run.step_as_is()

    run_both(case, program, tensors={case.backend: len(SHAPES) - 2})


def sparse(run: Run, coalesced: bool) -> Tensor:
    rows = torch.tensor([[0, 3, 32, 3]], device=DEVICE)
    grad = torch.sparse_coo_tensor(rows, run.randn((4, 5)), (33, 5))
    return grad.coalesce() if coalesced else grad


@few_cases
@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_grad(case: Case, coalesced: bool) -> None:
    def program(run: Run) -> None:
        for _i in range(3):
            run.set_grads()
            run.params[1].grad = sparse(run, coalesced)
            run.step_as_is()

    tensors = {case.backend: len(SHAPES) - 1, "stock": 1}
    ours, stock = run_both(case, program, tensors=tensors)
    assert str(ours.error) == str(stock.error)


@few_cases
def test_refused_sparse_grad_writes_nothing_not_even_to_earlier_groups(case: Case) -> None:
    def program(run: Run) -> None:
        late = torch.nn.Parameter(run.randn((33, 5)))
        run.opt.add_param_group({"params": [late]})
        run.step(2)
        run.set_grads()
        late.grad = sparse(run, True)
        before = snapshot(run.opt)
        try:
            run.step_as_is()
        except RuntimeError:
            if run.is_ours:
                assert_untouched(run.opt, before)
            raise

    run_both(case, program)


@few_cases
def test_dense_grads_after_sparse_ones(case: Case) -> None:
    def program(run: Run) -> None:
        run.set_grads()
        run.params[1].grad = sparse(run, False)
        run.step_as_is()
        run.step(2)

    run_both(case, program)


@few_cases
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(case: Case, dtype: torch.dtype) -> None:
    run_both(case, lambda run: run.step(3), dtype=dtype, tensors={"stock": len(SHAPES)})


@few_cases
def test_what_no_kernel_serves_beside_what_it_serves(case: Case) -> None:
    """Tensors that fall back do so alone, in the same step."""

    def program(run: Run) -> None:
        added = []
        for shape in STOCK_SHAPES:
            if shape.id != "grad_sparse":
                added.append((shape, torch.nn.Parameter(shape.param(torch.float32, run.generator))))
        run.opt.add_param_group({"params": [param for _, param in added]})
        for _ in range(2):
            run.set_grads()
            for shape, param in added:
                param.grad = shape.grad(torch.float32, run.generator)
            run.step_as_is()

    n_stock = sum(shape.id != "grad_sparse" for shape in STOCK_SHAPES)
    run_both(case, program, tensors={case.backend: len(SHAPES), "stock": n_stock})


# Grads whose memory does not hold their values as it lies; made from fresh values of the param's shape.
LAZY_GRADS = {
    "neg view": torch._neg_view,
    "neg bit of an imaginary part": lambda t: torch.complex(t, t * 2).conj().imag,
    "zero tensor": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device),
    "expanded": lambda t: t.new_tensor(0.75).expand(t.shape),
    "expanded rows": lambda t: t[:1].expand(t.shape) if t.dim() and t.numel() else t,
    "reversed strides": lambda t: (
        t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    ),
    "strided": lambda t: torch.stack([t, t * 3], -1)[..., 1],
    "offset": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
    "requires grad": lambda t: t.clone().requires_grad_(),
}


@few_cases
@pytest.mark.parametrize("kind", LAZY_GRADS)
def test_grad_that_is_a_view(case: Case, kind: str) -> None:
    def program(run: Run) -> None:
        run.step()
        for _ in range(2):
            for param in run.params:
                param.grad = LAZY_GRADS[kind](run.randn(param))
            run.step_as_is()

    run_both(case, program)


@few_cases
def test_grad_that_turns_into_a_negated_view_of_itself(case: Case) -> None:
    """The same object, and the same memory."""

    def program(run: Run) -> None:
        run.step(2)
        for param in run.params:
            param.grad.data = torch._neg_view(param.grad.data)
        run.step_as_is()

    run_both(case, program)


@few_cases
@pytest.mark.parametrize("kind", LAZY_GRADS)
def test_first_grad_that_is_a_view(case: Case, kind: str) -> None:
    def program(run: Run) -> None:
        for param in run.params:
            param.grad = LAZY_GRADS[kind](run.randn(param))
        run.step_as_is()
        run.step()

    run_both(case, program)


@few_cases
def test_conjugated_complex_grad(case: Case) -> None:
    def program(run: Run) -> None:
        for _ in range(2):
            for param in run.params:
                param.grad = run.randn(param).conj()
            run.step_as_is()

    run_both(case, program, dtype=torch.complex64)


@few_cases
@pytest.mark.parametrize("kind", ["neg view", "reversed strides", "expanded rows", "strided"])
def test_param_that_is_a_view(case: Case, kind: str) -> None:
    def program(run: Run) -> None:
        run.params = [torch.nn.Parameter(LAZY_GRADS[kind](p.data)) for p in run.params]
        run.opt = run.make(run.params)
        run.step(2)

    run_both(case, program)


@each_state
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, 1e-42, 0.0])
def test_special_values_propagate_as_stock(case: Case, value: float) -> None:
    def program(run: Run) -> None:
        run.step()
        run.set_grads()
        for param in run.params:
            if param.numel():
                param.grad.view(-1)[-1] = value
                param.grad.view(-1)[0] = value
        run.step_as_is()
        run.step()

    if value == 1e38:
        # A product of large numbers overflows or not depending on its order: only the places that
        # stay finite in float64 are the promise, and there none overflows.
        run_both(case, program, dtype=torch.float64)
    else:
        run_both(case, program)


@each_state
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_params_propagate_as_stock(case: Case, value: float) -> None:
    """weight_decay == 0 must not touch the grad: 0 * inf is NaN."""

    def program(run: Run) -> None:
        with torch.no_grad():
            run.params[0][3] = value
            run.params[1][2, 2] = value
        run.step(3)

    run_both(case, program)


@each_optimizer
@pytest.mark.parametrize("what", ["param", "grad", "both"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_nan_and_infinity_of_16_bits(case: Case, dtype: torch.dtype, what: str) -> None:
    """A NaN whose bits are all ones must not be rounded up to a zero, nor a small one down to an infinity."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    special = patterns[~patterns.isfinite()].to(DEVICE)
    runs = []
    for build in (case.fused, case.stock):
        run = Run(case, build, [special.shape], dtype)
        for n in range(3):
            run.set_grads()
            if n == 0 and what != "grad":
                run.params[0].data.copy_(special)
            if n <= 1 and what != "param":
                run.params[0].grad.copy_(special.flip(0) if what == "both" else special)
            run.step_as_is()
        runs.append([run.params[0].detach(), *run.opt.state.get(run.params[0], {}).values()])
    for ours, stock in zip(*runs):
        assert torch.equal(ours.isnan(), stock.isnan())
        assert torch.equal(ours.isinf(), stock.isinf())


@each_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_nan_as_a_hyperparameter_comes_out_as_nan(case: Case, dtype: torch.dtype) -> None:
    """With all bits of its payload set, which rounding would carry into the sign."""
    (payload,) = struct.unpack("d", bytes([0xFF] * 7 + [0x7F]))

    def keys(group: dict) -> list[str]:
        numbers = (float, int, tuple)
        return [k for k, v in group.items() if isinstance(v, numbers) and not isinstance(v, bool)]

    for key in keys(Run(case, case.stock).opt.param_groups[0]):
        if key == "lr":  # step() refuses it
            continue
        runs = []
        for build in (case.fused, case.stock):
            run = Run(case, build, [(33,)], dtype)
            group = run.opt.param_groups[0]
            group[key] = (payload, *group[key][1:]) if isinstance(group[key], tuple) else payload
            run.step(2)
            runs.append(run.params[0].detach().isnan())
        assert torch.equal(*runs), key


@few_cases
def test_dtypes_mixed_in_one_group(case: Case) -> None:
    def program(run: Run) -> None:
        run.params = [
            torch.nn.Parameter(run.randn((33, 5), dtype))
            for dtype in (torch.float32, torch.float64, torch.complex64) * 2
        ]
        run.opt = run.make(run.params)
        run.step(3)

    # Begun in float64, so that each tensor is held to its own dtype.
    run_both(case, program, dtype=torch.float64, tensors={case.backend: 4, "stock": 2})


@few_cases
def test_half_dtypes_are_served_beside_others(case: Case) -> None:
    run = Run(case, case.fused)
    dtypes = (torch.float16, torch.float32, torch.bfloat16, torch.float64)
    run.params = [torch.nn.Parameter(run.randn((33,), dtype)) for dtype in dtypes]
    run.opt = run.make(run.params, lr=0.1)  # an update that no dtype rounds away
    before = [param.detach().clone() for param in run.params]
    run.step(2)
    assert run.opt.last_step.tensors == {case.backend: len(dtypes)}
    for param, old in zip(run.params, before):
        assert param.dtype == old.dtype and param.isfinite().all()
        assert not torch.equal(param, old)


@few_cases
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_grad_of_another_dtype(
    case: Case, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    def program(run: Run) -> None:
        for param in run.params:
            param.grad_dtype = grad_dtype
        for _ in range(2):
            for param in run.params:
                param.grad = run.randn(param.shape, grad_dtype)
            run.step_as_is()

    # State may take the grad's dtype, whose eps the comparison then uses.
    run_both(case, program, dtype=param_dtype)


# The setter of param.grad refuses another dtype than the param's; that of param.grad.data does not.
MIXED = [
    (torch.float32, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float32),
]
mixed = pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=str)


@few_cases
@mixed
def test_grad_whose_data_has_another_dtype(
    case: Case, dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    def program(run: Run) -> None:
        run.step()
        for _ in range(2):
            run.set_grads()
            for param in run.params[::2]:
                param.grad.data = param.grad.data.to(grad_dtype)
            grads = [param.grad for param in run.params]
            run.step_as_is()
            assert all(param.grad is grad for param, grad in zip(run.params, grads))

    run_both(case, program, dtype=dtype)


SCALE = 4.0


@few_cases
@mixed
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("option", ["write_clipped_grads", "zero_grads"])
def test_one_pass_over_grads_whose_data_has_another_dtype(
    case: Case, dtype: torch.dtype, grad_dtype: torch.dtype, scaled: bool, option: str
) -> None:
    refused = {torch.float16} if DEVICE.type == "cpu" else {torch.float16, torch.bfloat16}
    if scaled and refused & {dtype, grad_dtype}:  # by torch's GradScaler
        other = torch.float32 if torch.bfloat16 in refused else torch.bfloat16
        dtype, grad_dtype = torch.float64, other

    def program(run: Run) -> None:
        run.step()
        if run.is_ours:
            run.opt.max_grad_norm = 0.5
            setattr(run.opt, option, True)
        module = fused_optim if run.is_ours else torch.amp  # torch's cannot write to expanded grads
        amp = module.GradScaler(DEVICE.type, init_scale=SCALE, enabled=scaled)
        for _ in range(2):
            run.set_grads()
            for param in run.params:
                param.grad.data = param.grad.data.to(grad_dtype) * (SCALE if scaled else 1)
            rows = run.params[1].grad.data[:1].expand(33, 5)
            run.params[1].grad.data = rows if run.is_ours else rows.clone()
            amp.scale(torch.ones((), device=DEVICE))
            if not run.is_ours:
                amp.unscale_(run.opt)
                torch.nn.utils.clip_grad_norm_(run.params, 0.5)
            amp.step(run.opt)
            amp.update()
            run.n_steps += 1
            if not run.is_ours and option == "zero_grads":
                run.opt.zero_grad(set_to_none=False)
            # No memory holds an expanded grad's elements one by one.
            run.seen += [param.grad.contiguous() for param in run.params]

    run_both(case, program, dtype=dtype)
