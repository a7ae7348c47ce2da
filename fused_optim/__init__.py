"""Drop-in torch.optim optimizers on multi-tensor kernels that run at the memory bus's speed."""

from fused_optim import optimizers
from fused_optim.backends import config, set_num_threads, show_config
from fused_optim.grad_scaler import GradScaler
from fused_optim.optimizer import Fallback, FusedOptimizer, StepReport
from fused_optim.optimizers import *  # noqa: F403
from fused_optim.options import FormatOptions, OnePassOptions
from fused_optim.patching import patch, patched, unpatch
from fused_optim.release import release_gradients

__version__ = "0.1.0"

__all__ = [
    "Fallback",
    "FormatOptions",
    "FusedOptimizer",
    "GradScaler",
    "OnePassOptions",
    "StepReport",
    "config",
    "patch",
    "patched",
    "release_gradients",
    "set_num_threads",
    "show_config",
    "unpatch",
]
__all__ += optimizers.__all__
