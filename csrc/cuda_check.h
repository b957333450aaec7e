// Every CUDA call goes through here: a failure becomes an exception with CUDA's own text.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace n2n {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  // begins as torch's do: whoever tells a device's faults from others goes by that
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(error) + ", at " + what);
}

// Launches on `stream`, an address; does not wait.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t stream,
            Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

}  // namespace n2n
