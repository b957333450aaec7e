"""Which errors a device is to blame for: these end a run, and no student is told to have failed by them."""

import numpy as np
import pytest
import torch

from n2n_fast.files.errors import BadInput, DeviceFault, device_fault, raise_device_fault, telling_device_faults

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB"),
    RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]
FAULTS = [
    RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: an illegal memory access was encountered, at kd_loss"),  # this package's own
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA driver error: device-side assert triggered"),
]
OTHERS = [
    RuntimeError("Given groups=1, weight of size [8, 3, 3, 3], expected input[2, 4, 8, 8] to have 3 channels"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed a non-contiguous input"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm`"),
    ValueError("CUDA error: a message about one"),
    BadInput("the teacher does not accept images of 3x8x8: out of memory"),
    ArithmeticError("the loss is nan at step 3"),
]
if hasattr(torch, "AcceleratorError"):
    FAULTS.append(torch.AcceleratorError("whatever it says"))


def raised_by(call):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - what it is, is what the test asks
        call()
    return caught.value


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_a_lack_of_memory_names_the_batch_size(error):
    assert device_fault(error).startswith("out of memory (")
    assert "--batch-size" in device_fault(error)


@pytest.mark.parametrize("call", [lambda: torch.empty(2**50), lambda: np.empty(2**50)], ids=["torch", "numpy"])
def test_so_does_the_cpus(call):
    assert "--batch-size" in device_fault(raised_by(call))


@pytest.mark.parametrize("error", FAULTS, ids=repr)
def test_a_failing_device_is_one_line(error):
    assert device_fault(error).startswith("the device failed (")
    assert "\n" not in device_fault(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_somebody_elses(error):
    assert device_fault(error) is None
    raise_device_fault(error)


def test_a_fault_is_bad_input_and_told_once():
    def fail():
        with telling_device_faults(), telling_device_faults():
            raise MemoryError("of 3 bytes")

    error = raised_by(fail)
    assert type(error) is DeviceFault
    assert isinstance(error, BadInput)
    assert device_fault(error) == str(error)
    assert str(error).count("out of memory") == 1


def test_others_pass_as_they_are():
    with pytest.raises(KeyError), telling_device_faults():
        raise KeyError
