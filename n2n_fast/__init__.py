"""N2N learning: compress a trained CNN into a much smaller one by policy gradients and distillation."""

from n2n_fast.files.errors import BadInput, DegenerateArchitecture
from n2n_fast.native import build_info, kd_loss, kd_loss_and_grad, materialize
from n2n_fast.networks.architecture import Architecture
from n2n_fast.networks.layers import Layer
from n2n_fast.networks.space import ArchitectureSpace
from n2n_fast.search.checkpoint import Interrupted
from n2n_fast.search.config import SearchConfig
from n2n_fast.search.reinforce import Rollout, SearchProgress, compress
from n2n_fast.search.result import Result, load_student
from n2n_fast.search.reward import Cost
from n2n_fast.search.workers import Workers
from n2n_fast.training.data import Augmentation, ImageData, from_tensors
from n2n_fast.training.datasets import load

__version__ = "0.1.0"
__all__ = [
    "Architecture",
    "ArchitectureSpace",
    "Augmentation",
    "BadInput",
    "Cost",
    "DegenerateArchitecture",
    "ImageData",
    "Interrupted",
    "Layer",
    "Result",
    "Rollout",
    "SearchConfig",
    "SearchProgress",
    "Workers",
    "build_info",
    "compress",
    "from_tensors",
    "kd_loss",
    "kd_loss_and_grad",
    "load",
    "load_student",
    "materialize",
]
