// Every CUDA kernel of the token warp, for the compiler to report on; never run.
#include "../../csrc/warp/warp_kernels.cuh"

namespace gsalign::warp {

template <typename T>
void instantiate(const Problem<T>& problem, const Plan& plan, const T* input, T* output, float* f) {
  launch_forward<T>(problem, plan, output, 1, kThreads, 0, cudaStream_t{});
  launch_backward<T>(problem, plan, input, output, f, f, f, 1, kThreads, 0, cudaStream_t{});
}

template void instantiate(const Problem<float>&, const Plan&, const float*, float*, float*);
template void instantiate(const Problem<Half>&, const Plan&, const Half*, Half*, float*);
template void instantiate(
    const Problem<BFloat16>&, const Plan&, const BFloat16*, BFloat16*, float*);

void instantiate_base(float* f) {
  launch_base(f, f, f, 1, 1, kThreads, cudaStream_t{});
}

}  // namespace gsalign::warp
