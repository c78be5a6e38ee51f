// Exact re-identification ranking: average precision, INP and first hit from a distance matrix.
//
// Free of torch and of Python, so that it can be tested and used on its own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gsalign::ranking {

// What is asked of what. All arrays are the caller's and are only read.
template <typename Real>
struct Problem {
  const Real* distances;  // [num_queries, num_gallery], rows `row_stride` elements apart
  std::ptrdiff_t row_stride;
  std::int64_t num_queries;
  std::int64_t num_gallery;
  const std::int64_t* query_identities;    // [num_queries]
  const std::int64_t* gallery_identities;  // [num_gallery]
  const std::int64_t* query_cameras;       // [num_queries]
  const std::int64_t* gallery_cameras;     // [num_gallery]
};

// Per query, all of length num_queries and written in full.
//
// For each query the gallery images of the same identity and camera are left out; the others of
// that identity are its positives. Ranks count from 1, in ascending order of distance, equal
// distances in the order of the gallery. A query without positives gets 0 positives, first rank 0
// and NaN for the two scores.
struct Scores {
  std::int64_t* num_positives;
  std::int64_t* first_rank;   // rank of the nearest positive
  double* average_precision;  // mean over positives of (positives so far / rank)
  double* inp;                // positives / rank of the last positive
};

// The place of a distance that is not a number; row -1 if there is none.
struct Place {
  std::int64_t row;
  std::int64_t column;
};

// Ranks every query. Takes O(num_gallery) memory per thread and no full sort: only the ranks of
// the positives are found, by counting what lies ahead of them. The result does not depend on the
// number of threads.
//
// `threads` < 1 uses as many as the machine has. Returns the first NaN in reading order, in which
// case the scores mean nothing.
template <typename Real>
Place rank(const Problem<Real>& problem, const Scores& scores, int threads);

extern template Place rank<float>(const Problem<float>&, const Scores&, int);
extern template Place rank<double>(const Problem<double>&, const Scores&, int);

}  // namespace gsalign::ranking
