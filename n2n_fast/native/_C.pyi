"""The native module; addresses are integers and trusted. Only n2n_fast/native calls it."""

from typing import TypedDict

import numpy as np

Table = np.ndarray  # twelve int64 for each piece

class BuildInfo(TypedDict):
    compiler: str
    cuda: bool
    cuda_version: str
    cuda_archs: str
    simd: list[str]
    simd_used: str

BEST_SIMD: int
KD_LOSS_WORKSPACE_WORDS: int

def build_info() -> BuildInfo: ...
def materialize_cpu(table: Table, element_bytes: int, flat: int, flat_elements: int, threads: int, /) -> None: ...
def kd_loss_cpu(
    dtype: int,
    rows: int,
    classes: int,
    student: int,
    teacher: int,
    labels: int,
    kd_weight: float,
    grad: int,
    loss: int,
    correct: int,
    threads: int,
    simd: int,
    /,
) -> None: ...

# Only where build_info()["cuda"].
def materialize_pack_words(table: Table, /) -> int: ...
def materialize_pack(table: Table, element_bytes: int, flat_elements: int, packed: int, /) -> int: ...
def materialize_cuda(packed: int, count: int, blocks: int, element_bytes: int, flat: int, stream: int, /) -> None: ...
def kd_loss_cuda(
    dtype: int,
    rows: int,
    classes: int,
    student: int,
    teacher: int,
    labels: int,
    kd_weight: float,
    grad: int,
    loss: int,
    correct: int,
    workspace: int,
    stream: int,
    /,
) -> None: ...
