"""Drop-in torch.optim optimizers on multi-tensor kernels that run at the memory bus's speed."""

from fused_optim.adagrad import Adagrad
from fused_optim.adam import Adam
from fused_optim.adamw import AdamW
from fused_optim.backends import config, show_config
from fused_optim.grad_scaler import GradScaler
from fused_optim.lion import Lion
from fused_optim.optimizer import Fallback, FusedOptimizer, StepReport
from fused_optim.options import FormatOptions, OnePassOptions
from fused_optim.patching import patch, patched, unpatch
from fused_optim.release import release_gradients
from fused_optim.rmsprop import RMSprop
from fused_optim.sgd import SGD

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Fallback",
    "FormatOptions",
    "FusedOptimizer",
    "GradScaler",
    "Lion",
    "OnePassOptions",
    "RMSprop",
    "StepReport",
    "config",
    "patch",
    "patched",
    "release_gradients",
    "show_config",
    "unpatch",
]
