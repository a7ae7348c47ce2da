"""The optimizers of the package. Whatever needs their names reads them here."""

from __future__ import annotations

import torch

from fused_optim.adadelta import Adadelta
from fused_optim.adagrad import Adagrad
from fused_optim.adam import Adam
from fused_optim.adamax import Adamax
from fused_optim.adamw import AdamW
from fused_optim.adamwschedulefree import AdamWScheduleFree
from fused_optim.ademamix import AdEMAMix
from fused_optim.asgd import ASGD
from fused_optim.lion import Lion
from fused_optim.nadam import NAdam
from fused_optim.optimizer import FusedOptimizer
from fused_optim.radam import RAdam
from fused_optim.rmsprop import RMSprop
from fused_optim.rprop import Rprop
from fused_optim.sgd import SGD

# In the order in which tables and sentences have them.
__all__ = [  # noqa: RUF022
    "Adam",
    "AdamW",
    "NAdam",
    "RAdam",
    "Adamax",
    "SGD",
    "ASGD",
    "RMSprop",
    "Rprop",
    "Adagrad",
    "Adadelta",
    "Lion",
    "AdEMAMix",
    "AdamWScheduleFree",
]

OPTIMIZERS: dict[str, type[FusedOptimizer]] = {name: globals()[name] for name in __all__}
# torch.optim's class -> ours, where it has one.
REPLACED: dict[type, type[FusedOptimizer]] = {
    ours._stock: ours
    for name, ours in OPTIMIZERS.items()
    if getattr(torch.optim, name, None) is ours._stock
}
