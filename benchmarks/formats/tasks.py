"""The demo's data and models, in sizes for many runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from demo_tasks import CharacterTransformer, Task, characters, digits


@dataclass(frozen=True)
class Training:
    """A task with the optimizer that trains it.

    Args:
        optimizer: of fused_optim.
        options: of the optimizer; lr falls to 0 along a cosine.
        n_evaluated: the first batches, on which the final training loss is taken in every run.
    """

    task: Task
    optimizer: str
    options: dict[str, Any]
    n_evaluated: int

    def with_seed(self, seed: int) -> Task:
        """The same batches in another order."""
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.task.batches), generator=random).tolist()
        return replace(self.task, batches=[self.task.batches[i] for i in order])


def replayed_task(n_steps: int) -> Task:
    """The demo's two-layer character transformer of 434 thousand params, in small batches."""
    return characters(n_steps, batch_size=8, context=32)


def trainings(n_character_steps: int, n_digit_epochs: int) -> list[Training]:
    """The character model with AdamW, the CNN with SGD."""
    text = characters(n_character_steps, batch_size=16, context=32)
    n_characters = text.build().embed_character.num_embeddings
    text = replace(text, build=lambda: CharacterTransformer(n_characters, 32, width=64, n_layers=1))
    return [
        Training(text, "AdamW", {"lr": 4e-3, "weight_decay": 0.1}, n_evaluated=64),
        Training(
            digits(n_digit_epochs),
            "SGD",
            {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
            n_evaluated=23,  # an epoch
        ),
    ]
