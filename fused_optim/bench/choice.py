"""The rows that `bench --model`, `--from`, `--optimizer` and `--format` ask for: their product."""

from collections.abc import Sequence

import torch

from fused_optim.bench import factory
from fused_optim.bench.models import FORMATS, MODELS, OWN, Model, model
from fused_optim.bench.workloads import Workload
from fused_optim.optimizers import OPTIMIZERS

DEFAULT_MODEL = "gpt2"
DEFAULT_OPTIMIZER = "AdamW"
# As they are mostly used; of the others, the defaults.
OPTIONS = {"SGD": {"momentum": 0.9}}
TITLES = {"SGD": "SGD momentum"}


def product(
    models: Sequence[str] | None,
    factories: Sequence[str] | None,
    names: Sequence[str] | None,
    formats: Sequence[str] | None,
) -> list[Workload]:
    """A row for each model, optimizer and format, called "gpt2-adamw-int8".

    Args:
        models: keys of MODELS.
        factories: see factory.load(). With neither models nor factories: DEFAULT_MODEL.
        names: keys of OPTIMIZERS; None: DEFAULT_OPTIMIZER.
        formats: keys of FORMATS; None: the models' own.

    Raises:
        ValueError: one of them is unknown, or a factory's model cannot be had.
    """
    names = list(dict.fromkeys(names or [DEFAULT_OPTIMIZER]))
    formats = list(dict.fromkeys(formats or [OWN]))
    models = list(dict.fromkeys(models or ([] if factories else [DEFAULT_MODEL])))
    for option, given, known in (
        ("--model", models, MODELS),
        ("--optimizer", names, OPTIMIZERS),
        ("--format", formats, FORMATS),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"{option} {name!r} is unknown; accepted: {', '.join(known)}")
    found = [model(name) for name in models]
    found += [factory.load(spec) for spec in dict.fromkeys(factories or [])]
    return [
        _workload(one, optimizer, format_)
        for one in found
        for optimizer in names
        for format_ in formats
    ]


def _workload(model: Model, optimizer: str, format_name: str) -> Workload:
    format_ = FORMATS[format_name]
    dtypes = model.dtypes or (torch.float32,) * len(model.shapes)
    if format_.dtype is not None:
        # Formats are those of real numbers of at most 32 bits; others stay what they are.
        dtypes = tuple(
            format_.dtype if dtype.is_floating_point and dtype.itemsize <= 4 else dtype
            for dtype in dtypes
        )
    parts = [model.name, optimizer.lower(), *([format_name] if format_name != OWN else [])]
    described = [TITLES.get(optimizer, optimizer), *([format_.title] if format_.title else [])]
    return Workload(
        "-".join(parts),
        f"{' '.join(described)}, {model.title}",
        optimizer,
        model.shapes,
        options=OPTIONS.get(optimizer, {}),
        dtype=dtypes[0],
        dtypes=dtypes if len(set(dtypes)) > 1 else (),
        format=format_name,
    )
