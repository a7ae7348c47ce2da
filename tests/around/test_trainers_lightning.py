"""Lightning's Trainer, its wrapper of optimizers, and Fabric."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import fused_optim
from support.marks import needs_cpu_kernels
from support.recordings import Recording, assert_stock_does_the_same, recorded

pytestmark = [
    needs_cpu_kernels,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
N_EPOCHS, N_BATCHES = 2, 3
Make = Callable[[Any], torch.optim.Optimizer]


@pytest.fixture(scope="module")
def lightning() -> Any:
    """Imported here, so that the other processes need not."""
    import lightning

    return lightning


@pytest.fixture
def make_module(lightning: Any) -> Callable[..., Any]:
    class Module(lightning.LightningModule):
        def __init__(self, make: Make, manual: bool) -> None:
            super().__init__()
            self.make, self.automatic_optimization = make, not manual
            self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = self.net(batch[0]).square().mean()
            if not self.automatic_optimization:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            opt = self.make(self.parameters())
            scheduler = {"scheduler": ExponentialLR(opt, 0.9), "interval": "step"}
            return {"optimizer": opt, "lr_scheduler": scheduler}

    def make_module(make: Make, manual: bool = False) -> Any:
        torch.manual_seed(0)
        return Module(make, manual)

    return make_module


@pytest.fixture
def fit(lightning: Any) -> Callable[..., tuple[Any, Recording]]:
    def fit(module: Any, n_epochs: int = N_EPOCHS, ckpt_path: Any = None, **arguments: Any) -> Any:
        random = torch.Generator().manual_seed(1)
        x = torch.randn(4 * N_BATCHES, 64, generator=random)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=n_epochs,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            **arguments,
        )
        with recorded() as recording:
            trainer.fit(module, DataLoader(TensorDataset(x), batch_size=4), ckpt_path=ckpt_path)
        return trainer, recording

    return fit


def adamw(**options: Any) -> Make:
    return lambda params: fused_optim.AdamW(params, lr=1e-2, **options)


def stock_adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def are_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-mixed", "gradient_clip_val": 0.1, "accumulate_grad_batches": 3},
    ],
    ids=str,
)
def test_fit(make_module: Any, fit: Any, arguments: dict[str, Any]) -> None:
    _, ours = fit(make_module(adamw()), **arguments)
    assert type(ours.optimizer) is fused_optim.AdamW
    assert ours.optimizer.last_step.tensors == {"cpu": 4}
    assert_stock_does_the_same(ours, torch.optim.AdamW)
    if "gradient_clip_val" in arguments:
        assert all(nn.utils.get_total_norm(grads) <= 0.1 * 1.001 for grads in ours.grads)

    _, stock = fit(make_module(stock_adamw), **arguments)
    assert are_equal(ours.grads[0], stock.grads[0])
    assert ours.options == stock.options
    n_steps = N_EPOCHS * N_BATCHES // arguments.get("accumulate_grad_batches", 1)
    assert len({options[0]["lr"] for options in ours.options}) == n_steps


def test_patched(make_module: Any, fit: Any) -> None:
    with fused_optim.patched(ema_decay=0.5):
        _, ours = fit(make_module(stock_adamw))
    assert type(ours.optimizer) is fused_optim.AdamW
    assert len(ours.optimizer.ema_params()) == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": "int8", "ema_decay": 0.5, "max_grad_norm": 0.1}],
    ids=["plain", "int8, ema, clip"],
)
def test_resuming_is_going_on(
    make_module: Any, fit: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    half, _ = fit(make_module(adamw(**options)))
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(make_module(adamw(**options)), 2 * N_EPOCHS, ckpt_path=tmp_path / "half.ckpt")
    _, whole = fit(make_module(adamw(**options)), 2 * N_EPOCHS)
    assert len(resumed.params) == N_EPOCHS * N_BATCHES == len(whole.params) // 2
    assert are_equal(resumed.params[-1], whole.params[-1])
    assert resumed.options == whole.options[N_EPOCHS * N_BATCHES :]
    if options:
        assert are_equal(resumed.optimizer.ema_params(), whole.optimizer.ema_params())
        assert resumed.optimizer.grad_norm == whole.optimizer.grad_norm


def test_two_places_that_clip_are_refused_in_mixed_precision(make_module: Any, fit: Any) -> None:
    """As with fused=True of torch.optim: grads are still scaled when Lightning would clip them."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(make_module(adamw(max_grad_norm=1.0)), precision="bf16-mixed", gradient_clip_val=1.0)


def lightning_s_wrapper(make_module: Any, fit: Any, make: Make) -> Any:
    module = make_module(make, manual=True)
    _, recording = fit(module)
    wrapper = module.optimizers()
    assert wrapper is not recording.optimizer is wrapper.optimizer
    return wrapper


def fabric_s_wrapper(lightning: Any, make: Make) -> Any:
    net = nn.Linear(64, 64)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net, wrapper = fabric.setup(net, make(net.parameters()))
    for _ in range(2):
        wrapper.zero_grad()
        fabric.backward(net(torch.ones(2, 64)).square().mean())
        wrapper.step()
    return wrapper


@pytest.fixture(params=["Trainer", "Fabric"])
def make_wrapper(
    request: pytest.FixtureRequest, lightning: Any, make_module: Any, fit: Any
) -> Callable[..., Any]:
    """Lightning's wrapper of an optimizer that has taken steps."""
    if request.param == "Fabric":
        return lambda **options: fabric_s_wrapper(lightning, adamw(**options))
    return lambda **options: lightning_s_wrapper(make_module, fit, adamw(**options))


ALL = {"max_grad_norm": 0.1, "ema_decay": 0.5, "skip_nonfinite": True, "state_dtype": "int8"}


def test_the_wrapper_tells_what_its_optimizer_has_done(make_wrapper: Any) -> None:
    wrapper = make_wrapper(**ALL)
    inner = wrapper.optimizer
    assert isinstance(wrapper, fused_optim.AdamW) and wrapper is not inner
    assert wrapper.last_step == inner.last_step is not None
    assert wrapper.grad_norm is inner.grad_norm is not None
    assert wrapper.explain() == inner.explain()
    assert are_equal(wrapper.ema_params(), inner.ema_params())
    assert not are_equal(wrapper.ema_params(), wrapper.param_groups[0]["params"])
    assert are_equal(wrapper.master_params(), inner.master_params())
    assert wrapper.state_dict()["ema"].keys() == inner.state_dict()["ema"].keys()
    for name in ("max_grad_norm", "skip_nonfinite", "write_clipped_grads", "zero_grads"):
        assert getattr(wrapper, name) == getattr(inner, name)
    inner.param_groups[0]["params"][0].grad = torch.full((64, 64), torch.nan)
    inner.step()
    assert wrapper.skipped_steps == 1


def test_the_wrapper_takes_options(make_wrapper: Any) -> None:
    wrapper = make_wrapper()
    inner = wrapper.optimizer
    assert inner.max_grad_norm is None
    wrapper.max_grad_norm = 0.5
    wrapper.zero_grads = True
    assert (inner.max_grad_norm, inner.zero_grads) == (0.5, True)
    assert wrapper.max_grad_norm == 0.5


def test_the_wrapper_s_averages_and_groups(make_wrapper: Any) -> None:
    wrapper = make_wrapper(**ALL)
    inner = wrapper.optimizer
    averages = [average.clone() for average in inner.ema_params()]
    params = inner.param_groups[0]["params"]
    with wrapper.swapped_ema():
        assert are_equal(params, averages)
        with pytest.raises(RuntimeError, match="within swapped_ema"):
            inner.step()
    assert not are_equal(params, averages)
    wrapper.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert inner.param_groups[1]["ema_decay"] == 0.5
    assert inner.param_groups[1]["state_dtype"] == "int8"


def test_release_gradients_of_a_wrapped_optimizer(lightning: Any) -> None:
    net = nn.Linear(8, 8)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    net, wrapper = fabric.setup(net, fused_optim.AdamW(net.parameters(), lr=1e-2))
    before = [param.detach().clone() for param in net.parameters()]
    with fused_optim.release_gradients(net, wrapper):
        fabric.backward(net(torch.ones(2, 8)).square().mean())
        wrapper.step()
    assert all(param.grad is None for param in net.parameters())
    assert not any(map(torch.equal, before, net.parameters()))
    assert wrapper.last_step.tensors == {"cpu": 2}


@pytest.mark.usefixtures("lightning")
def test_example(capsys: pytest.CaptureFixture) -> None:
    runpy.run_path(str(EXAMPLES / "train_lightning.py"), run_name="__main__")
    assert "tensors by {'cpu': 4}" in capsys.readouterr().out
