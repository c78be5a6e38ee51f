// Every CUDA kernel of thin-plate splines, for the compiler to report on; never run.
#include "../../csrc/tps/tps_kernels.cuh"

namespace gsalign::tps {

template <typename R>
void instantiate(const Splines<R>& splines, const Points<R>& points, R* r, double* d, int* i) {
  const cudaStream_t stream{};
  const SolvePlan plan{};
  launch_solve(r, r, 0.0, 1, 3, 1, plan, r, d, i, 0, stream);
  launch_solve_backward(r, r, r, d, 1, 3, 1, plan, r, r, d, 0, stream);
  launch_evaluate(splines, points, kSplineThreads, r, stream);
  launch_points_backward(splines, points, r, kSplineThreads, r, stream);
  launch_gradient(splines, points, r, 1, kSplineThreads, r, r, r, stream);
}

template void instantiate(const Splines<float>&, const Points<float>&, float*, double*, int*);
template void instantiate(const Splines<double>&, const Points<double>&, double*, double*, int*);

}  // namespace gsalign::tps
