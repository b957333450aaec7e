"""N2N learning: compress a trained CNN into a much smaller one by policy gradients and distillation."""

from n2n_fast.data import Augmentation, ImageData, from_tensors, load
from n2n_fast.errors import BadInput, DegenerateArchitecture
from n2n_fast.graph import Architecture, Layer
from n2n_fast.ops import build_info, kd_loss, kd_loss_and_grad, materialize
from n2n_fast.search import Result, Rollout, SearchConfig, SearchProgress, compress, load_student
from n2n_fast.space import ArchitectureSpace

__version__ = "0.1.0"
__all__ = [
    "Architecture",
    "ArchitectureSpace",
    "Augmentation",
    "BadInput",
    "DegenerateArchitecture",
    "ImageData",
    "Layer",
    "Result",
    "Rollout",
    "SearchConfig",
    "SearchProgress",
    "build_info",
    "compress",
    "from_tensors",
    "kd_loss",
    "kd_loss_and_grad",
    "load",
    "load_student",
    "materialize",
]
