"""N2N learning: compress a trained CNN into a much smaller one by policy gradients and distillation."""

from n2n_fast.config import SearchConfig
from n2n_fast.data import Augmentation, ImageData, from_tensors
from n2n_fast.datasets import load
from n2n_fast.errors import BadInput, DegenerateArchitecture
from n2n_fast.graph import Architecture, Layer
from n2n_fast.ops import build_info, kd_loss, kd_loss_and_grad, materialize
from n2n_fast.result import Result, load_student
from n2n_fast.reward import Cost
from n2n_fast.run_directory import Interrupted
from n2n_fast.search import Rollout, SearchProgress, compress
from n2n_fast.space import ArchitectureSpace
from n2n_fast.workers import Workers

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
