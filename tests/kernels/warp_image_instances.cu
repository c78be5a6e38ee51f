// Every CUDA kernel of the image warp, for the compiler to report on; never run.
#include "../../csrc/warp/warp_image_kernels.cuh"

namespace gsalign::warp {

template <typename T>
void instantiate(const Sampling& sampling, const Image<T>& image, T* out, float* f) {
  launch_image_forward<T>(sampling, image, {}, true, out, kThreads, cudaStream_t{});
  launch_image_backward<T>(
      sampling, image, {}, true, out, out, f, f, f, 1, kThreads, cudaStream_t{});
}

template void instantiate(const Sampling&, const Image<float>&, float*, float*);
template void instantiate(const Sampling&, const Image<Half>&, Half*, float*);
template void instantiate(const Sampling&, const Image<BFloat16>&, BFloat16*, float*);

}  // namespace gsalign::warp
