"""What the demo trains: two small models on real data that ships in a package."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

# Modules that every supported Python has as single files, so that all machines with one Python
# version train on the same text.
STDLIB_MODULES = (
    "argparse",
    "ast",
    "calendar",
    "configparser",
    "dataclasses",
    "difflib",
    "fractions",
    "functools",
    "heapq",
    "mailbox",
    "random",
    "shutil",
    "statistics",
    "textwrap",
)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A model and the batches it sees, the same ones in the same order in every run.

    Args:
        name: what the report calls it.
        build: makes the model from torch's global random state.
        batches: list of (inputs, integer class targets), one per training step.
        held_out: one (inputs, targets) pair that training never sees.
    """

    name: str
    build: Callable[[], nn.Module]
    batches: list[Batch]
    held_out: Batch

    def first(self, n_steps: int) -> Task:
        """The same task, cut to its first `n_steps` batches."""
        return Task(self.name, self.build, self.batches[:n_steps], self.held_out)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over all targets of the batch."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def accuracy_of(model: nn.Module, batch: Batch) -> float:
    """Fraction of targets that are the model's first choice."""
    inputs, targets = batch
    with torch.no_grad():
        return (model(inputs).argmax(-1) == targets).double().mean().item()


def blind_loss(targets: Tensor) -> float:
    """The lowest cross-entropy of a model that ignores its input: the entropy of the targets."""
    counts = torch.bincount(targets.flatten()).double()
    frequencies = counts[counts > 0] / counts.sum()
    return -(frequencies * frequencies.log()).sum().item()


def digits(n_epochs: int, batch_size: int = 64) -> Task:
    """scikit-learn's 1,797 handwritten digits (8x8 pixels) and a two-layer CNN."""
    pixels, values = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.as_tensor(values, dtype=torch.int64)
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=random)
    held_out, train = order[:360], order[360:]
    batches = [
        (images[batch], labels[batch])
        for _epoch in range(n_epochs)
        for batch in train[torch.randperm(len(train), generator=random)].split(batch_size)
    ]
    return Task("digits", _digits_model, batches, (images[held_out], labels[held_out]))


def _digits_model() -> nn.Module:
    # Smooth throughout: where max-pooling ties, as it does on blank pixels, or a ReLU sits at its
    # kink, rounding would decide which way a whole gradient goes.
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    )


def characters(n_steps: int, batch_size: int = 12, context: int = 64) -> Task:
    """The source text of Python's standard library and a character-level transformer."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = "".join((stdlib / f"{name}.py").read_text("utf-8") for name in STDLIB_MODULES)
    alphabet = {character: code for code, character in enumerate(sorted(set(text)))}
    codes = torch.tensor([alphabet[character] for character in text])
    train, rest = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
    random = torch.Generator().manual_seed(0)
    batches = [_windows(train, batch_size, context, random) for _step in range(n_steps)]
    return Task(
        "characters",
        lambda: CharacterTransformer(len(alphabet), context),
        batches,
        _windows(rest, 64, context, random),
    )


def _windows(codes: Tensor, batch_size: int, context: int, random: torch.Generator) -> Batch:
    """Random windows of the text, and the same windows one character later."""
    starts = torch.randint(len(codes) - context, (batch_size, 1), generator=random)
    positions = starts + torch.arange(context)
    return codes[positions], codes[positions + 1]


class CharacterTransformer(nn.Module):
    """A causal transformer: codes (batch, context) to logits (batch, context, vocab)."""

    def __init__(
        self, n_characters: int, context: int, width: int = 128, n_layers: int = 2
    ) -> None:
        super().__init__()
        self.embed_character = nn.Embedding(n_characters, width)
        self.embed_position = nn.Embedding(context, width)
        layer = nn.TransformerEncoderLayer(
            width,
            nhead=4,
            dim_feedforward=4 * width,
            dropout=0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, num_layers=n_layers, enable_nested_tensor=False)
        self.to_logits = nn.Linear(width, n_characters)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask)

    def forward(self, codes: Tensor) -> Tensor:
        hidden = self.embed_character(codes) + self.embed_position.weight
        return self.to_logits(self.layers(hidden, mask=self.mask, is_causal=True))
