"""One program, run with the stock optimizer and with ours from the same seed, and compared."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from support.cases import DEVICE, Case
from support.program import SCALARS, Program, begun

# Grads are of unit size, so every value is at most `1 + max|value|`. Each of the two implementations makes
# fewer than 16 roundings per element and step, half an eps each, of a value at most 4 times that
# (RMSprop divides by sqrt((1 - alpha) grad^2), which multiplies an lr of at most 0.1 by 10): 2 * 16 / 2 * 4.
ROUNDINGS_PER_STEP = 64

# Coupled weight decay may cancel a grad, and dividing by the grad's own size then shows the rounding of what
# was cancelled. The smallest of n normal numbers is about 1 / n, and RMSprop takes 0.1 * 10 of its inverse:
# below this many elements that is within ROUNDINGS_PER_STEP, above it the bound grows with them.
NUMEL_PER_BOUND = 512

SHAPES = ((7,), (33, 5), (), (0,), (2, 3, 4, 4))

# Flags that choose an implementation, not the arithmetic.
IMPLEMENTATION_FLAGS = ("foreach", "fused")


class Run(Program):
    """What a program sees: an optimizer over `params`, and grads from its own random stream."""

    def __init__(
        self,
        case: Case,
        build: Callable[..., Optimizer],
        shapes: Sequence = SHAPES,
        dtype: torch.dtype = torch.float32,
        extra: dict | None = None,
    ) -> None:
        self.case = case
        self.build = build
        self.is_ours = build == case.fused
        self.extra = extra or {}
        # The coarsest dtype of what the params began as and of the hypers.
        self.dtype = max(dtype, case.tensor_dtype, key=lambda d: torch.finfo(d).eps)
        self.generator = torch.Generator().manual_seed(1)
        self.params = [torch.nn.Parameter(self.randn(shape, dtype)) for shape in shapes]
        super().__init__(self.make(self.params), self.params)
        self.seen: list = []
        self.error: Exception | None = None

    def make(self, params: Iterable, **extra: object) -> Optimizer:
        fresh = {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.extra.items()}
        return self.build(params, **{**fresh, **extra})

    def randn(self, shape: Sequence[int] | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        if isinstance(shape, Tensor):
            shape, dtype = shape.shape, shape.dtype
        # Drawn in float64 on the CPU whatever the dtype and device: all runs see the same numbers.
        if dtype.is_complex:
            drawn = torch.randn((*shape, 2), generator=self.generator, dtype=torch.float64)
            return torch.view_as_complex(drawn).to(dtype).to(DEVICE)
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(dtype).to(DEVICE)

    def set_grads(self) -> None:
        for group in self.opt.param_groups:
            for param in group["params"]:
                param.grad = self.randn(param)


def run_both(
    case: Case,
    program: Callable[[Run], object],
    shapes: Sequence = SHAPES,
    dtype: torch.dtype = torch.float32,
    tensors: dict[str, int] | None = None,
    **extra: object,
) -> tuple[Run, Run]:
    """Ours and stock after `program`; asserts the same outcome: values, layouts, error.

    `tensors` is the expected `last_step.tensors` of the last step that ours took.
    """
    runs = []
    for build in (case.fused, case.stock):
        run = Run(case, build, shapes, dtype, extra)
        try:
            program(run)
        except Exception as error:
            run.error = error
        runs.append(run)
    ours, stock = runs
    if stock.error is None:
        if ours.error is not None:
            raise ours.error
        assert_same_run(ours, stock)
        if tensors is not None:
            assert ours.opt.last_step.tensors == tensors
    else:
        assert ours.error is not None, f"stock raised {stock.error!r}, ours did not"
        assert type(ours.error) is type(stock.error), (ours.error, stock.error)
    return ours, stock


def assert_same_run(ours: Run, stock: Run) -> None:
    n_steps = max(ours.n_steps, 1)
    assert ours.n_steps == stock.n_steps
    assert_same_groups(ours.opt, stock.opt, n_steps, stock.dtype)
    assert len(ours.params) == len(stock.params)
    for i, (param, stock_param) in enumerate(zip(ours.params, stock.params)):
        eps = coarsest_eps(stock_param, stock.dtype, stock.opt.state.get(stock_param, {}))
        assert_close(param, stock_param, n_steps, f"params[{i}]", eps)
    assert len(ours.seen) == len(stock.seen)
    for i, (value, stock_value) in enumerate(zip(ours.seen, stock.seen)):
        assert_close_any(value, stock_value, n_steps, f"seen[{i}]")


def assert_same_groups(ours: Optimizer, stock: Optimizer, n_steps: int, dtype: torch.dtype) -> None:
    """Groups, params and state of two optimizers that began in `dtype`, in the order of their params."""
    assert len(ours.param_groups) == len(stock.param_groups)
    counts = [sum(begun(s) is s for s in opt.state.values()) for opt in (ours, stock)]
    assert counts[0] == counts[1]
    for i, (group, stock_group) in enumerate(zip(ours.param_groups, stock.param_groups)):
        assert set(group) == set(stock_group)
        for key in set(group) - {"params", *IMPLEMENTATION_FLAGS}:
            assert group[key] == stock_group[key], (i, key)
        assert len(group["params"]) == len(stock_group["params"])
        for j, (param, stock_param) in enumerate(zip(group["params"], stock_group["params"])):
            name = f"group {i} param {j}"
            state = begun(ours.state.get(param, {}))
            stock_state = begun(stock.state.get(stock_param, {}))
            eps = coarsest_eps(stock_param, dtype, stock_state)
            assert_close(param, stock_param, n_steps, name, eps)
            assert list(state) == list(stock_state), name
            for key in state:
                value, stock_value = state[key], stock_state[key]
                if key in {"step", *SCALARS} and torch.is_tensor(value):
                    # Stock's fused code keeps a count on the param's device, its for-loop on the CPU, and
                    # load_state_dict moves other numbers; ours are where it is known what is skipped.
                    assert value.device in (param.device, stock_value.device), name
                    value = value.to(stock_value.device)
                assert_close_any(value, stock_value, n_steps, f"{name} {key}", eps)


def coarsest_eps(param: Tensor, dtype: torch.dtype, state: dict) -> float:
    """Of what a param's history was rounded to: itself, its grad, its state, what it began as."""
    tensors = [t for t in (param, param.grad, *state.values()) if torch.is_tensor(t)]
    dtypes = [
        dtype,
        *(t.dtype for t in tensors if t.is_floating_point() and t.dim() == param.dim()),
    ]
    return max(torch.finfo(rounded).eps for rounded in dtypes)


def assert_close_any(
    ours: object, stock: object, n_steps: int, name: str, eps: float = 0.0
) -> None:
    if isinstance(stock, Tensor):
        assert isinstance(ours, Tensor), name
        if stock.is_sparse or ours.is_sparse:
            assert stock.is_sparse and ours.is_sparse, name
            ours, stock = ours.to_dense(), stock.to_dense()
        assert_close(ours, stock, n_steps, name, eps)
    else:
        assert ours == stock, name


def assert_close(
    ours: Tensor, stock: Tensor, n_steps: int, name: str = "", eps: float = 0.0
) -> None:
    """Equal layout; equal NaN and Inf; else within ROUNDINGS_PER_STEP for each of `n_steps`.

    A rounding is of the tensor's dtype, or of the coarser `eps` of what it was computed from.
    """
    ours, stock = ours.detach(), stock.detach()
    layouts = [(t.dtype, t.device, t.shape, t.stride()) for t in (ours, stock)]
    assert layouts[0] == layouts[1], (name, layouts)
    if stock.is_complex():
        ours, stock = torch.view_as_real(ours.resolve_conj()), torch.view_as_real(stock)
    if not stock.is_floating_point() or name.endswith(" step"):
        assert torch.allclose(ours, stock, rtol=0, atol=0, equal_nan=True), (name, ours, stock)
        return
    finite = stock.isfinite()
    assert torch.equal(ours.isnan(), stock.isnan()), f"{name}: NaN in other places"
    infinite = stock.isinf()
    assert torch.equal(ours[infinite], stock[infinite]), f"{name}: other infinities"
    if not finite.any():
        return
    eps = max(eps, torch.finfo(stock.dtype).eps)
    ours, stock = ours[finite].double(), stock[finite].double()
    bound = ROUNDINGS_PER_STEP * n_steps * eps * (1 + stock.abs().max())
    bound *= max(1, stock.numel() / NUMEL_PER_BOUND)
    error = (ours - stock).abs().max()
    assert error <= bound, f"{name}: differs by {error:.3g}, allowed {bound:.3g}"


def snapshot(opt: Optimizer) -> list:
    """Every param, grad and state tensor, bit for bit."""
    found = []
    for group in opt.param_groups:
        for param in group["params"]:
            found.append(_bits(param))
            found.append(_bits(param.grad))
            states = begun(opt.state.get(param, {}))
            found.append({key: _bits(value) for key, value in states.items()})
    return found


def step_or_leave_untouched(run: Run) -> None:
    """A step; one of ours that raises must have written nothing."""
    run.set_grads()
    before = snapshot(run.opt)
    try:
        run.step_as_is()
    except Exception:
        if run.is_ours:
            assert_untouched(run.opt, before)
        raise


def _bits(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.is_sparse:
        value = value.to_dense()
    raw = value.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return (value.dtype, value.shape, raw.reshape(-1).view(torch.uint8).cpu().numpy().tobytes())


def assert_untouched(opt: Optimizer, before: list) -> None:
    assert snapshot(opt) == before, "something was written before the error was raised"
