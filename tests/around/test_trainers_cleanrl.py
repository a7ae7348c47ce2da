"""A script in the manner of CleanRL's ppo.py: it makes its optimizer itself and anneals lr by hand.

CleanRL is scripts to copy. The package of that name has those of 2020, which need gym and tensorboard.
"""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_optim
from support.marks import needs_cpu_kernels
from support.recordings import Recording, assert_stock_does_the_same, recorded

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("one_thread")]

PPO = """
import gymnasium as gym
import torch
import torch.nn as nn
import torch.optim as optim
from torch.distributions.categorical import Categorical

NUM_ENVS, NUM_STEPS, NUM_UPDATES, NUM_MINIBATCHES, UPDATE_EPOCHS = 4, 32, 3, 4, 2
LEARNING_RATE, GAMMA, CLIP_COEF, MAX_GRAD_NORM = 2.5e-4, 0.99, 0.2, 0.5


class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))

    def act(self, obs, action=None):
        policy = Categorical(logits=self.actor(obs))
        action = policy.sample() if action is None else action
        return action, policy.log_prob(action), policy.entropy(), self.critic(obs).flatten()


if __name__ == "__main__":
    torch.manual_seed(1)
    envs = gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * NUM_ENVS)
    agent = Agent()
    optimizer = optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)
    obs = torch.as_tensor(envs.reset(seed=1)[0])
    for update in range(NUM_UPDATES):
        optimizer.param_groups[0]["lr"] = (1.0 - update / NUM_UPDATES) * LEARNING_RATE
        rollout = []
        for _ in range(NUM_STEPS):
            with torch.no_grad():
                action, logprob, _, value = agent.act(obs)
            next_obs, reward, terminated, truncated, _ = envs.step(action.numpy())
            done = torch.as_tensor(terminated | truncated)
            rollout.append((obs, action, logprob, value, torch.as_tensor(reward).float(), done))
            obs = torch.as_tensor(next_obs)
        with torch.no_grad():
            running, returns = agent.act(obs)[3], []
        for *_, reward, done in reversed(rollout):
            running = reward + GAMMA * running * ~done
            returns.insert(0, running)
        b_obs, b_actions, b_logprobs, b_values = (
            torch.cat(each) for each in list(zip(*rollout))[:4]
        )
        b_returns = torch.cat(returns)
        for epoch in range(UPDATE_EPOCHS):
            for inds in torch.randperm(len(b_obs)).chunk(NUM_MINIBATCHES):
                _, logprob, entropy, value = agent.act(b_obs[inds], b_actions[inds])
                ratio = (logprob - b_logprobs[inds]).exp()
                advantages = b_returns[inds] - b_values[inds]
                advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
                clipped = ratio.clamp(1 - CLIP_COEF, 1 + CLIP_COEF)
                pg_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
                v_loss = 0.5 * (value - b_returns[inds]).square().mean()
                loss = pg_loss - 0.01 * entropy.mean() + 0.5 * v_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
                optimizer.step()
    envs.close()
"""
LINE = "optimizer = optim.Adam(agent.parameters(), lr=LEARNING_RATE, eps=1e-5)"
N_STEPS, N_TENSORS = 3 * 2 * 4, 8


def trained(folder: Path, script: str = PPO) -> Recording:
    (folder / "ppo.py").write_text(script)
    with recorded() as recording:
        runpy.run_path(str(folder / "ppo.py"), run_name="__main__")
    return recording


@pytest.mark.parametrize("how", ["one line", "patched"])
def test_training(tmp_path: Path, how: str) -> None:
    if how == "patched":
        with fused_optim.patched():
            ours = trained(tmp_path)
    else:
        assert PPO.count(LINE) == 1
        changed = LINE.replace("optim.Adam", "__import__('fused_optim').Adam")
        ours = trained(tmp_path, PPO.replace(LINE, changed))
    assert type(ours.optimizer) is fused_optim.Adam
    assert ours.optimizer.last_step.tensors == {"cpu": N_TENSORS}
    assert len(ours.params) == N_STEPS
    assert_stock_does_the_same(ours, torch.optim.Adam)
    assert len({options[0]["lr"] for options in ours.options}) == 3, "lr was not annealed"
    assert ours.options[0][0]["eps"] == 1e-5

    stock = trained(tmp_path)
    assert type(stock.optimizer) is torch.optim.Adam
    assert ours.options == stock.options
    assert all(map(torch.equal, ours.grads[0], stock.grads[0]))


def test_run(tmp_path: Path) -> None:
    (tmp_path / "ppo.py").write_text(PPO)
    done = subprocess.run(
        [sys.executable, "-m", "fused_optim", "run", "ppo.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fused_optim")]
    assert re.match(rf"fused_optim: Adam: {N_STEPS} steps, [\d.e-]+ s in step\(\)", lines[0])
    where = f"{N_TENSORS} on CPU kernels, 0 by torch.optim's code"
    assert lines[1] == f"fused_optim:   tensors in a step: {where}"
