"""Which errors a device is to blame for: these end a run, and no student is told to have failed by them."""

import numpy as np
import pytest
import torch

from n2n_fast.files.errors import (
    BadInput,
    DegenerateArchitecture,
    DeviceFault,
    device_fault,
    raise_device_fault,
    telling_device_faults,
)

NO_MEMORY = "out of memory ("
FAILED = "the device failed ("
ERRORS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.15 GiB"), NO_MEMORY),
    (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), NO_MEMORY),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), NO_MEMORY),
    (MemoryError(), NO_MEMORY),
    (RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might come later"), FAILED),
    (RuntimeError("CUDA error: an illegal memory access was encountered, at kd_loss"), FAILED),  # this package's own
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), FAILED),
    (RuntimeError("CUDA driver error: device-side assert triggered"), FAILED),
    *([(torch.AcceleratorError("whatever it says"), FAILED)] if hasattr(torch, "AcceleratorError") else []),
    (RuntimeError("Given groups=1, weight of size [8, 3, 3, 3], expected input[2, 4, 8, 8] to have 3 channels"), None),
    (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. You may have passed a non-contiguous input"), None),
    (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"), None),
    (ValueError("CUDA error: a message about one"), None),
    (BadInput("the teacher does not accept images of 3x8x8: out of memory"), None),
    (ArithmeticError("the loss is nan at step 3"), None),
]


@pytest.mark.parametrize(("error", "start"), ERRORS, ids=repr)
def test_a_fault_of_the_device_is_one_line_and_other_errors_are_none(error, start):
    told = device_fault(error)
    if start is None:
        assert told is None
        raise_device_fault(error)
    else:
        assert told.startswith(start)
        assert "\n" not in told
        assert ("--batch-size" in told) == (start == NO_MEMORY)


@pytest.mark.parametrize("call", [lambda: torch.empty(2**50), lambda: np.empty(2**50)], ids=["torch", "numpy"])
def test_a_lack_of_the_cpus_memory_is_one_too(call):
    with pytest.raises(DeviceFault, match="--batch-size"), telling_device_faults():
        call()


def test_a_fault_is_bad_input_and_told_once():
    faults = pytest.raises(DeviceFault, match=r"^out of memory \(of 3 bytes\)")
    with faults as caught, telling_device_faults(), telling_device_faults():
        raise MemoryError("of 3 bytes")
    assert isinstance(caught.value, BadInput)
    assert device_fault(caught.value) == str(caught.value)


def test_others_pass_as_they_are():
    with pytest.raises(KeyError), telling_device_faults():
        raise KeyError


def test_a_degenerate_architecture_says_why():
    error = DegenerateArchitecture("too large")
    assert isinstance(error, ValueError)
    assert error.reason == str(error) == "too large"
