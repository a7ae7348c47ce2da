"""stable-baselines3's agents, as their users swap an optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fused_optim
from support.marks import needs_cpu_kernels
from support.recordings import Recording, assert_stock_does_the_same, recorded

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("one_thread")]

OF_ALGORITHM: dict[str, dict[str, Any]] = {
    "PPO": {"n_steps": 64, "batch_size": 32, "n_epochs": 3},
    "DQN": {"learning_starts": 100, "target_update_interval": 100},
    "A2C": {},
}
N_ENV_STEPS = 256
# Steps of the optimizer in as many of the environment.
N_STEPS = {"PPO": 4 * 3 * 2, "DQN": (256 - 100) // 4, "A2C": -(-256 // 5)}


@pytest.fixture(scope="module")
def sb3() -> Any:
    """Imported here, so that the other processes need not."""
    import stable_baselines3

    return stable_baselines3


def make(sb3: Any, algorithm: str, **policy_kwargs: Any) -> Any:
    return getattr(sb3, algorithm)(
        "MlpPolicy",
        "CartPole-v1",
        seed=0,
        device="cpu",
        policy_kwargs=policy_kwargs,
        **OF_ALGORITHM[algorithm],
    )


def trained(agent: Any) -> Recording:
    with recorded() as recording:
        agent.learn(N_ENV_STEPS)
    return recording


def are_equal(left: list, right: list) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize(
    ("algorithm", "name", "policy_kwargs"),
    [
        (
            "PPO",
            "Adam",
            {"optimizer_class": fused_optim.Adam, "optimizer_kwargs": {"eps": 1e-5}},
        ),
        ("PPO", "Adam", None),
        ("DQN", "Adam", {"optimizer_class": fused_optim.Adam}),
        ("DQN", "Adam", None),
        ("A2C", "RMSprop", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "patched" if value is None else "class",
)
def test_training(sb3: Any, algorithm: str, name: str, policy_kwargs: dict | None) -> None:
    """With the class as an argument, or with stable-baselines3's defaults in patched()."""
    if policy_kwargs is None:
        with fused_optim.patched():
            agent = make(sb3, algorithm)
    else:
        agent = make(sb3, algorithm, **policy_kwargs)
    ours = trained(agent)
    assert agent.policy.optimizer is ours.optimizer
    assert type(ours.optimizer) is getattr(fused_optim, name)
    assert ours.optimizer.last_step.tensors == {"cpu": len(ours.params[0])}
    assert len(ours.params) == N_STEPS[algorithm]
    assert_stock_does_the_same(ours, getattr(torch.optim, name))

    stock = trained(make(sb3, algorithm))
    assert type(stock.optimizer) is getattr(torch.optim, name)
    assert are_equal(ours.grads[0], stock.grads[0])
    assert ours.options == stock.options


def test_ppos_eps_is_that_of_torchs_own_class_alone(sb3: Any) -> None:
    agent = make(sb3, "PPO", optimizer_class=fused_optim.Adam)
    assert agent.policy.optimizer.defaults["eps"] == 1e-8
    assert make(sb3, "PPO").policy.optimizer.defaults["eps"] == 1e-5


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_save_and_load(sb3: Any, tmp_path: Path, state_dtype: str | None) -> None:
    agent = make(
        sb3,
        "PPO",
        optimizer_class=fused_optim.Adam,
        optimizer_kwargs={"eps": 1e-5, "state_dtype": state_dtype},
    )
    agent.learn(64)
    agent.save(tmp_path / "agent")
    loaded = sb3.PPO.load(tmp_path / "agent", device="cpu")
    found, expected = loaded.policy.optimizer, agent.policy.optimizer
    assert type(found) is fused_optim.Adam
    dtypes = {state["exp_avg"].dtype for state in found.state.values()}
    assert dtypes == {torch.float32, torch.int8 if state_dtype == "int8" else torch.float32}
    params = [[p for g in opt.param_groups for p in g["params"]] for opt in (found, expected)]
    assert are_equal(*params)
    for param, its_twin in zip(*params, strict=True):
        state, its_state = found.state[param], expected.state[its_twin]
        assert state.keys() == its_state.keys()
        assert are_equal(list(state.values()), list(its_state.values()))


def test_schedule_that_overshoots(sb3: Any) -> None:
    """stable-baselines3 counts whole rollouts: the last one of this linear schedule is beyond its end."""
    with fused_optim.patched():
        agent = sb3.PPO(
            "MlpPolicy",
            "CartPole-v1",
            learning_rate=lambda remaining: remaining * 1e-3,
            n_steps=64,
            n_epochs=2,
            device="cpu",
        )
    agent.learn(100)
    assert agent.policy.optimizer.param_groups[0]["lr"] < 0
    assert agent.policy.optimizer.last_step.tensors.keys() == {"cpu"}
