"""Hugging Face's Trainer and Accelerate, as their users swap an optimizer."""

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import fused_optim
from support.marks import needs_cpu_kernels
from support.recordings import Recording, assert_stock_does_the_same, recorded
from support.twins import assert_close

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("one_thread")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
N_STEPS, HALF = 6, 3
LR = 1e-2
# The Trainer's names for classes of torch.optim; the first is its default.
OPTIMS = {
    "adamw_torch_fused": "AdamW",
    "adamw_torch": "AdamW",
    "sgd": "SGD",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
}
SMALL_STATES = {"state_dtype": "int8", "ema_decay": 0.9}


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    """What the tests need of transformers: imported here, so that the other processes need not."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    return SimpleNamespace(
        config=LlamaConfig(
            vocab_size=256,  # times hidden_size: enough elements for 8-bit states
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        model_class=LlamaForCausalLM,
        trainer_class=Trainer,
        arguments_class=TrainingArguments,
    )


class Counting(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(8) + index) % 16
        return {"input_ids": tokens, "labels": tokens}


@pytest.fixture
def make_trainer(hf: SimpleNamespace, tmp_path: Path) -> Callable[..., Any]:
    def make(
        how: str = "untouched", options: dict[str, Any] | None = None, **arguments: Any
    ) -> Any:
        """A Trainer that saves half-way.

        Args:
            how: to have our optimizer: "optimizers" and "class" are arguments of Trainer.
            options: of our optimizer, if it is not the trainer that makes it.
            arguments: of TrainingArguments.
        """
        torch.manual_seed(0)
        model = hf.model_class(hf.config)
        options = {"lr": LR, **(options or {})}
        given: dict[str, Any] = {}
        if how == "optimizers":
            opt = fused_optim.AdamW(model.parameters(), **options)
            given["optimizers"] = (opt, LinearLR(opt, 1.0, 0.1, N_STEPS))
        elif how == "class":
            given["optimizer_cls_and_kwargs"] = (fused_optim.AdamW, options)
        return hf.trainer_class(
            model,
            hf.arguments_class(
                str(tmp_path),
                **{
                    "max_steps": N_STEPS,
                    "save_steps": HALF,
                    "per_device_train_batch_size": 4,
                    "learning_rate": LR,
                    "weight_decay": 0.1,
                    "use_cpu": True,
                    "report_to": "none",
                    "disable_tqdm": True,
                    "logging_strategy": "no",
                    **arguments,
                },
            ),
            train_dataset=Counting(),
            **given,
        )

    return make


def trained(trainer: Any, **how: Any) -> Recording:
    with recorded() as recording:
        trainer.train(**how)
    return recording


def stepped_by_kernels(recording: Recording, name: str = "AdamW") -> bool:
    optimizer = recording.optimizer
    n_tensors = len(recording.params[0])
    return (
        type(optimizer) is getattr(fused_optim, name)
        and optimizer.last_step.tensors == {"cpu": n_tensors}
        and len(recording.params) == N_STEPS
    )


def last_params(recording: Recording) -> list[Tensor]:
    return recording.params[-1]


def are_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize("optim", OPTIMS)
def test_an_untouched_trainer_within_patched(make_trainer: Callable[..., Any], optim: str) -> None:
    name = OPTIMS[optim]
    with fused_optim.patched():
        trainer = make_trainer(optim=optim)
        ours = trained(trainer)
    assert stepped_by_kernels(ours, name)
    assert trainer.optimizer.optimizer is ours.optimizer
    assert bool(ours.optimizer.defaults.get("fused")) == optim.endswith("fused")
    assert_stock_does_the_same(ours, getattr(torch.optim, name))

    stock = trained(make_trainer(optim=optim))
    assert type(stock.optimizer) is getattr(torch.optim, name)
    assert are_equal(ours.grads[0], stock.grads[0])
    assert ours.options == stock.options
    assert len({options[0]["lr"] for options in ours.options}) == N_STEPS, "no schedule"
    assert [options["weight_decay"] for options in ours.options[0]] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("how", "arguments"),
    [
        ("optimizers", {}),
        ("class", {}),
        ("class", {"bf16": True, "gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_arguments_of_trainer(make_trainer: Callable[..., Any], how: str, arguments: dict) -> None:
    ours = trained(make_trainer(how, **arguments))
    assert stepped_by_kernels(ours)
    assert ours.optimizer.param_groups[0]["lr"] < LR
    assert_stock_does_the_same(ours, torch.optim.AdamW)


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("untouched", {}),
        ("untouched", SMALL_STATES),
        ("optimizers", {"state_dtype": torch.bfloat16}),
        ("class", {}),
    ],
    ids=["patched", "patched, int8 and ema", "optimizers, bfloat16", "class"],
)
def test_resuming_is_going_on(
    make_trainer: Callable[..., Any], tmp_path: Path, how: str, options: dict
) -> None:
    with fused_optim.patched(**(options if how == "untouched" else {})):
        whole = trained(make_trainer(how, options))
        resumed = trained(
            make_trainer(how, options), resume_from_checkpoint=str(tmp_path / f"checkpoint-{HALF}")
        )
    assert len(resumed.params) == N_STEPS - HALF
    assert are_equal(last_params(resumed), last_params(whole))
    assert resumed.options == whole.options[HALF:]
    if "ema_decay" in options:
        assert are_equal(resumed.optimizer.ema_params(), whole.optimizer.ema_params())
    if options.get("state_dtype") is not None:
        (state, *_) = resumed.optimizer.state.values()
        assert state["exp_avg"].dtype != torch.float32, "these states are not small"


def test_the_first_of_the_names_is_the_default(make_trainer: Callable[..., Any]) -> None:
    assert make_trainer().args.optim == next(iter(OPTIMS))


def test_a_checkpoint_of_stock_goes_on_with_ours(
    make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    trained(make_trainer())
    checkpoint = tmp_path / f"checkpoint-{HALF}"
    with fused_optim.patched():
        ours = trained(make_trainer(), resume_from_checkpoint=str(checkpoint))
    stock = trained(make_trainer(), resume_from_checkpoint=str(checkpoint))
    assert type(ours.optimizer) is fused_optim.AdamW
    assert are_equal(ours.grads[0], stock.grads[0])
    (step,) = {int(state["step"]) for state in ours.optimizer.state.values()}
    assert step == N_STEPS


def test_the_step_clips_where_the_trainer_does_not(make_trainer: Callable[..., Any]) -> None:
    limit = 0.05
    ours = trained(make_trainer("class", {"max_grad_norm": limit}, max_grad_norm=0))
    assert stepped_by_kernels(ours)
    for grads in ours.grads:
        norm = nn.utils.get_total_norm(grads)
        assert norm > 2 * limit, "nothing to clip"
        for grad in grads:
            grad.mul_(limit / norm)
    assert_stock_does_the_same(ours, torch.optim.AdamW)


class Loop:
    """A loop of one's own with Accelerate: two batches to a step, clipped, on a schedule."""

    def __init__(self, optimizer_class: type[torch.optim.Optimizer], **options: Any) -> None:
        from accelerate import Accelerator

        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        opt = optimizer_class(net.parameters(), lr=LR, **options)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model, self.opt, self.scheduler = self.accelerator.prepare(
            net, opt, LinearLR(opt, 1.0, 0.1, N_STEPS)
        )

    def run(self, first: int, last: int) -> Recording:
        with recorded() as recording:
            for i in range(2 * first, 2 * last):
                random = torch.Generator().manual_seed(i)
                with self.accelerator.accumulate(self.model):
                    x = torch.randn(4, 64, generator=random)
                    self.accelerator.backward(self.model(x).square().mean())
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                    self.opt.step()
                    self.scheduler.step()
                    self.opt.zero_grad()
        return recording


@pytest.fixture
def accelerate() -> Iterator[None]:
    """Accelerate keeps its state in classes: the next test begins anew."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.mark.usefixtures("accelerate")
def test_a_loop_with_accelerate() -> None:
    loop = Loop(fused_optim.AdamW)
    ours = loop.run(0, N_STEPS)
    assert stepped_by_kernels(ours)
    assert_stock_does_the_same(ours, torch.optim.AdamW)
    assert loop.opt.optimizer is ours.optimizer
    assert loop.opt.optimizer.last_step.tensors == {"cpu": 4}
    assert "4 of 4 tensors on kernels" in str(loop.opt.optimizer.explain())
    for grads in ours.grads:
        assert nn.utils.get_total_norm(grads) == pytest.approx(0.1, rel=1e-4)

    stock = Loop(torch.optim.AdamW).run(0, N_STEPS)
    assert are_equal(ours.grads[0], stock.grads[0])
    assert ours.options == stock.options


@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize(
    "options",
    [{}, SMALL_STATES, {"state_dtype": torch.bfloat16}],
    ids=["plain", "int8", "bfloat16"],
)
def test_save_state_and_load_state(tmp_path: Path, options: dict) -> None:
    loop = Loop(fused_optim.AdamW, **options)
    loop.run(0, HALF)
    loop.accelerator.save_state(str(tmp_path))
    whole = loop.run(HALF, N_STEPS)
    again = Loop(fused_optim.AdamW, **options)
    again.accelerator.load_state(str(tmp_path))
    resumed = again.run(HALF, N_STEPS)
    assert again.opt.optimizer is not loop.opt.optimizer
    assert are_equal(last_params(resumed), last_params(whole))
    assert resumed.options == whole.options
    if "ema_decay" in options:
        assert are_equal(again.opt.optimizer.ema_params(), loop.opt.optimizer.ema_params())


@pytest.mark.usefixtures("accelerate")
@pytest.mark.parametrize(
    ("options", "like"),
    [({}, {}), ({"fused": True}, {"fused": True}), ({"max_grad_norm": 9.0}, {"fused": True})],
    ids=["plain", "fused", "one pass"],
)
def test_accelerate_s_wrapper_with_a_grad_scaler(options: dict, like: dict) -> None:
    """As Accelerate makes it for float16, which it refuses on a CPU."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)

    def run(optimizer_class: type[torch.optim.Optimizer], **options: Any) -> tuple[Recording, list]:
        param = nn.Parameter(torch.ones(5))
        opt = optimizer_class([param], lr=LR, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        wrapper = AcceleratedOptimizer(opt, scaler=scaler)
        seen = []
        with recorded() as recording:
            for factor in (1.0, float("inf"), 1.0):
                wrapper.zero_grad()
                scaler.scale((param * factor).sum()).backward()
                wrapper.step()
                n_steps = int(opt.state[param]["step"])
                seen.append((wrapper.step_was_skipped, n_steps, param[0].item()))
        return recording, seen

    ours, seen = run(fused_optim.AdamW, **options)
    stock, stock_seen = run(torch.optim.AdamW, **like)
    assert ours.optimizer.last_step.tensors == {"cpu": 1}
    assert [values[:2] for values in seen] == [values[:2] for values in stock_seen]
    assert [n_steps for _, n_steps, _ in seen] == [1, 1, 2]
    assert seen[0][2] == seen[1][2] > seen[2][2]
    assert_close(ours.params[-1][0], stock.params[-1][0], 2)


@pytest.mark.parametrize("name", ["train_transformers", "train_accelerate"])
@pytest.mark.usefixtures("accelerate")
def test_example(name: str, capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "tensors by {'cpu': " in capsys.readouterr().out
