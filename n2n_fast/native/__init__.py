"""The native operators, and the one door to the extension ``_C``."""

from n2n_fast.native.boundary import build_info
from n2n_fast.native.kd_loss import kd_loss, kd_loss_and_grad, kd_loss_and_grad_reference, kd_loss_reference
from n2n_fast.native.materialize import WeightBank, materialize, materialize_numel, materialize_reference

__all__ = [
    "WeightBank",
    "build_info",
    "kd_loss",
    "kd_loss_and_grad",
    "kd_loss_and_grad_reference",
    "kd_loss_reference",
    "materialize",
    "materialize_numel",
    "materialize_reference",
]
