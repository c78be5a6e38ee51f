// Every CUDA kernel of masked part pooling, for the compiler to report on; never run.
#include "../../csrc/pool/pool_kernels.cuh"

namespace gsalign::pool {

template <typename T>
void instantiate(
    const Problem<T>& problem, const ForwardPlan& forward, const BackwardPlan& backward,
    const Results<T>& results, const Gradients<T>& gradients, float* f) {
  launch_forward<T>(problem, forward, results, 0, cudaStream_t{});
  launch_backward<T>(problem, false, backward, gradients, f, 0, cudaStream_t{});
}

#define GSALIGN_INSTANTIATE(T)                                                       \
  template void instantiate(                                                         \
      const Problem<T>&, const ForwardPlan&, const BackwardPlan&, const Results<T>&, \
      const Gradients<T>&, float*)
GSALIGN_INSTANTIATE(float);
GSALIGN_INSTANTIATE(Half);
GSALIGN_INSTANTIATE(BFloat16);

}  // namespace gsalign::pool
