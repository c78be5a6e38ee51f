// The pybind11 module gsalign_kernels._bindings: the build report, and ranking on NumPy arrays.
//
// Free of torch, so that it loads whatever PyTorch is installed.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "ranking/ranking.h"

// A JSON object with what was compiled and how; the build passes it.
#ifndef GSALIGN_BUILD_REPORT_JSON
#define GSALIGN_BUILD_REPORT_JSON "{}"
#endif

namespace py = pybind11;

namespace {

using Integers = py::array_t<std::int64_t, py::array::c_style>;

void check_length(const Integers& array, const char* name, py::ssize_t wanted) {
  if (array.ndim() != 1 || array.shape(0) != wanted) {
    throw py::value_error(
        std::string(name) + " must have shape [" + std::to_string(wanted) + "], got " +
        py::str(array.attr("shape")).cast<std::string>());
  }
}

template <typename Real>
py::dict rank(
    const py::array_t<Real, 0>& distances, const Integers& query_identities,
    const Integers& gallery_identities, const Integers& query_cameras,
    const Integers& gallery_cameras, int threads) {
  if (distances.ndim() != 2) {
    throw py::value_error(
        "distances must have shape [Q, G], got " +
        py::str(distances.attr("shape")).template cast<std::string>());
  }
  const py::ssize_t queries = distances.shape(0);
  const py::ssize_t gallery = distances.shape(1);
  constexpr auto size = static_cast<py::ssize_t>(sizeof(Real));
  // The stride of a dimension that is never stepped along means nothing.
  const bool steps_down = queries > 1 && gallery > 0;
  const bool steps_right = queries > 0 && gallery > 1;
  if ((steps_right && distances.strides(1) != size) ||
      (steps_down && distances.strides(0) % size != 0)) {
    throw py::value_error("the rows of distances must be contiguous (numpy.ascontiguousarray)");
  }
  check_length(query_identities, "query_identities", queries);
  check_length(query_cameras, "query_cameras", queries);
  check_length(gallery_identities, "gallery_identities", gallery);
  check_length(gallery_cameras, "gallery_cameras", gallery);

  py::array_t<std::int64_t> num_positives(queries);
  py::array_t<std::int64_t> first_rank(queries);
  py::array_t<double> average_precision(queries);
  py::array_t<double> inp(queries);
  const gsalign::ranking::Problem<Real> problem{
      distances.data(),
      steps_down ? distances.strides(0) / size : 0,
      queries,
      gallery,
      query_identities.data(),
      gallery_identities.data(),
      query_cameras.data(),
      gallery_cameras.data()};
  const gsalign::ranking::Scores scores{
      num_positives.mutable_data(), first_rank.mutable_data(), average_precision.mutable_data(),
      inp.mutable_data()};
  gsalign::ranking::Place bad{};
  {
    const py::gil_scoped_release release;
    bad = gsalign::ranking::rank(problem, scores, threads);
  }
  if (bad.row >= 0) {
    throw py::value_error(
        "distances[" + std::to_string(bad.row) + ", " + std::to_string(bad.column) + "] is NaN");
  }
  py::dict result;
  result["num_positives"] = num_positives;
  result["first_rank"] = first_rank;
  result["average_precision"] = average_precision;
  result["inp"] = inp;
  return result;
}

constexpr const char* kRankDoc =
    "Rank every query: rank(distances, query_identities, gallery_identities, query_cameras,\n"
    "gallery_cameras, threads=0) -> dict of num_positives, first_rank (int64 [Q]),\n"
    "average_precision and inp (float64 [Q]).\n\n"
    "distances is float32 or float64 [Q, G] with contiguous rows, the others int64. Gallery\n"
    "images of the query's identity and camera are left out; ties go to the lower gallery index.\n"
    "A query without positives gets 0 positives, first rank 0 and NaN scores. threads=0 uses all.\n"
    "Raises ValueError for wrong shapes and for NaN.";

py::dict build_report() {
  py::dict report = py::module_::import("json").attr("loads")(GSALIGN_BUILD_REPORT_JSON);
  py::dict compiler;
#if defined(__clang__)
  compiler["name"] = "clang";
  compiler["version"] = __clang_version__;
#elif defined(__GNUC__)
  compiler["name"] = "gcc";
  compiler["version"] = __VERSION__;
#elif defined(_MSC_VER)
  compiler["name"] = "msvc";
  compiler["version"] = std::to_string(_MSC_FULL_VER);
#endif
  compiler["standard"] = static_cast<std::int64_t>(__cplusplus);
  if (!report.contains("compiler"))
    report["compiler"] = compiler;
  return report;
}

}  // namespace

PYBIND11_MODULE(_bindings, module) {
  module.doc() = "Build report and exact re-identification ranking.";
  const auto define = [&](auto function, const char* doc) {
    module.def(
        "rank", function, doc, py::arg("distances").noconvert(), py::arg("query_identities"),
        py::arg("gallery_identities"), py::arg("query_cameras"), py::arg("gallery_cameras"),
        py::arg("threads") = 0);
  };
  define(&rank<float>, kRankDoc);
  define(&rank<double>, "The same for float64 distances.");
  module.def(
      "build_report", &build_report,
      "What was compiled, for which targets, by which compiler, as the build passed it.");
}
