"""The programs, with their libraries' defaults, and the optimizers that they may get."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import fused_optim

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

OURS = "fused_optim"
DEFAULT, FUSED = "torch.optim", "torch.optim, fused=True"
# Contestant -> where its optimizers are, and what their constructors get beyond the program's arguments.
CONTESTANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    DEFAULT: (torch.optim, {}),
    FUSED: (torch.optim, {"fused": True}),
    OURS: (fused_optim, {}),
}


@dataclass(frozen=True)
class Program:
    """A whole training.

    Args:
        title: for a table.
        unit: what n_steps counts.
        n_steps: how long it trains in a measurement, 5 to 10 s on one core.
        optimizer: name of its class.
        train: (optimizer class, further arguments of its constructor, seed, n_steps) -> None.
        module: what it imports, before the clock starts.
        needs: the module and the package without which it does not run.
    """

    title: str
    unit: str
    n_steps: int
    optimizer: str
    train: Callable[[type[Optimizer], dict[str, Any], int, int], None]
    module: str
    needs: tuple[str, str]

    def titled(self, n_steps: int) -> str:
        return f"{self.title}, {n_steps:,} {self.unit}"


def _train_by_sb3(
    algorithm: str, optimizer: type[Optimizer], options: dict[str, Any], seed: int, n_steps: int
) -> None:
    stable_baselines3 = importlib.import_module("stable_baselines3")
    policy = {"optimizer_class": optimizer, "optimizer_kwargs": options}
    new = getattr(stable_baselines3, algorithm)
    new("MlpPolicy", "CartPole-v1", policy_kwargs=policy, seed=seed, device="cpu").learn(n_steps)


def train_ppo(optimizer: type[Optimizer], options: dict[str, Any], seed: int, n_steps: int) -> None:
    # What PPO's policy gives to torch.optim.Adam and to no other class.
    _train_by_sb3("PPO", optimizer, {"eps": 1e-5, **options}, seed, n_steps)


def train_dqn(optimizer: type[Optimizer], options: dict[str, Any], seed: int, n_steps: int) -> None:
    _train_by_sb3("DQN", optimizer, options, seed, n_steps)


def train_characters(
    optimizer: type[Optimizer], options: dict[str, Any], seed: int, n_steps: int
) -> None:
    """Size and loop of nanoGPT's example for a CPU, on the text of Python's library."""
    from demo_tasks import CharacterTransformer, characters, loss_of

    context = 64
    task = characters(n_steps, batch_size=12, context=context)
    torch.manual_seed(seed)
    n_characters = task.build().embed_character.num_embeddings
    model = CharacterTransformer(n_characters, context, width=128, n_layers=4)
    opt = optimizer(model.parameters(), **options)
    for batch in task.batches:
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()


PROGRAMS = {
    "ppo": Program(
        "PPO on CartPole", "env steps", 10_240, "Adam", train_ppo,
        "stable_baselines3", ("stable_baselines3", "stable-baselines3"),
    ),
    "dqn": Program(
        "DQN on CartPole", "env steps", 10_000, "Adam", train_dqn,
        "stable_baselines3", ("stable_baselines3", "stable-baselines3"),
    ),
    "characters": Program(
        "character transformer", "batches", 120, "AdamW", train_characters,
        "demo_tasks", ("sklearn", "scikit-learn"),
    ),
}  # fmt: skip
