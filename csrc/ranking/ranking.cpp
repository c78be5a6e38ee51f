// The ranker: one row at a time, rows dealt out to threads.

#include "ranking.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

namespace gsalign::ranking {
namespace {

// Up to this many positives, counting what is ahead of each in a pass of its own is faster than
// one pass with a binary search per element: the passes vectorise and the row stays in cache.
constexpr std::size_t kCountingLimit = 192;

// Elements counted before the partial sum is added up; the sum fits into the 32-bit lanes.
constexpr std::int64_t kBlock = 1 << 20;

// The gallery grouped by identity, so that a row need not be searched for its positives.
class IdentityIndex {
 public:
  IdentityIndex(const std::int64_t* identities, std::int64_t count)
      : identities_(identities), order_(static_cast<std::size_t>(count)) {
    std::iota(order_.begin(), order_.end(), std::int64_t{0});
    std::stable_sort(order_.begin(), order_.end(), [&](std::int64_t a, std::int64_t b) {
      return identities_[a] < identities_[b];
    });
  }

  // The places of an identity in the gallery, in ascending order.
  std::pair<const std::int64_t*, const std::int64_t*> find(std::int64_t identity) const {
    const auto first = std::partition_point(
        order_.begin(), order_.end(), [&](std::int64_t i) { return identities_[i] < identity; });
    const auto last = std::partition_point(
        first, order_.end(), [&](std::int64_t i) { return identities_[i] <= identity; });
    return {order_.data() + (first - order_.begin()), order_.data() + (last - order_.begin())};
  }

 private:
  const std::int64_t* identities_;
  std::vector<std::int64_t> order_;
};

template <typename Real>
std::int64_t find_nan(const Real* row, std::int64_t count) {
  for (std::int64_t start = 0; start < count; start += kBlock) {
    const std::int64_t stop = std::min(count, start + kBlock);
    std::int32_t found = 0;
    for (std::int64_t j = start; j < stop; ++j)
      found |= row[j] != row[j];
    if (found) {
      return std::find_if(row + start, row + stop, [](Real d) { return d != d; }) - row;
    }
  }
  return -1;
}

// How many of row[begin..end) are below `limit`, or not above it if `equal_counts`.
template <bool equal_counts, typename Real>
std::int64_t count_ahead(const Real* row, std::int64_t begin, std::int64_t end, Real limit) {
  std::int64_t total = 0;
  for (std::int64_t start = begin; start < end; start += kBlock) {
    const std::int64_t stop = std::min(end, start + kBlock);
    std::int32_t count = 0;
    for (std::int64_t j = start; j < stop; ++j) {
      count += equal_counts ? row[j] <= limit : row[j] < limit;
    }
    total += count;
  }
  return total;
}

// The scratch space of one thread and what it does with a row.
template <typename Real>
class RowRanker {
 public:
  RowRanker(const Problem<Real>& problem, const IdentityIndex& index, const Scores& scores)
      : problem_(problem), index_(index), scores_(scores) {}

  // Scores query `q`; returns the column of a NaN or -1.
  std::int64_t operator()(std::int64_t q) {
    const Real* row = problem_.distances + q * problem_.row_stride;
    const std::int64_t bad = find_nan(row, problem_.num_gallery);
    if (bad >= 0)
      return bad;

    positives_.clear();
    junk_.clear();
    const auto [first, last] = index_.find(problem_.query_identities[q]);
    for (const std::int64_t* j = first; j != last; ++j) {
      const bool same_camera = problem_.gallery_cameras[*j] == problem_.query_cameras[q];
      (same_camera ? junk_ : positives_).push_back({row[*j], *j});
    }
    std::sort(positives_.begin(), positives_.end());

    const std::size_t count = positives_.size();
    scores_.num_positives[q] = static_cast<std::int64_t>(count);
    if (count == 0) {
      scores_.first_rank[q] = 0;
      scores_.average_precision[q] = scores_.inp[q] = std::numeric_limits<double>::quiet_NaN();
      return -1;
    }
    if (count <= kCountingLimit) {
      count_each(row);
    } else {
      count_all(row);
    }

    double precisions = 0;
    for (std::size_t k = 0; k < count; ++k) {
      precisions += static_cast<double>(k + 1) / static_cast<double>(ahead_[k] + 1);
    }
    scores_.first_rank[q] = ahead_.front() + 1;
    scores_.average_precision[q] = precisions / static_cast<double>(count);
    scores_.inp[q] = static_cast<double>(count) / static_cast<double>(ahead_.back() + 1);
    return -1;
  }

 private:
  // A gallery image: pairs compare by distance, then by place, which is the order of the ranking.
  using Entry = std::pair<Real, std::int64_t>;

  // Fills ahead_ with one pass over the row per positive.
  void count_each(const Real* row) {
    ahead_.clear();
    for (const Entry& positive : positives_) {
      const auto [distance, place] = positive;
      const std::int64_t all = count_ahead<true>(row, 0, place, distance) +
                               count_ahead<false>(row, place + 1, problem_.num_gallery, distance);
      const auto left_out = std::count_if(
          junk_.begin(), junk_.end(), [&](const Entry& entry) { return entry < positive; });
      ahead_.push_back(all - left_out);
    }
  }

  // Fills ahead_ with one pass over the row, each element looking for its place among the
  // positives.
  void count_all(const Real* row) {
    keys_.clear();
    for (const Entry& positive : positives_)
      keys_.push_back(positive.first);
    ahead_.assign(positives_.size() + 1, 0);
    const Real farthest = positives_.back().first;
    for (std::int64_t j = 0; j < problem_.num_gallery; ++j) {
      if (row[j] <= farthest)
        ++ahead_[behind({row[j], j})];
    }
    for (const Entry& entry : junk_) {
      if (entry.first <= farthest)
        --ahead_[behind(entry)];
    }
    // ahead_[k] now holds the entries for which positive k is the first behind them.
    ahead_.pop_back();
    std::partial_sum(ahead_.begin(), ahead_.end(), ahead_.begin());
  }

  // The number of the first positive behind an entry; an entry is not behind itself.
  std::size_t behind(const Entry& entry) const {
    // The outcome of each comparison is as good as random, and mispredicted branches would take
    // most of the time: multiplying leaves the compiler none to make.
    const Real* key = keys_.data();
    for (std::size_t left = keys_.size(); left > 1;) {
      const std::size_t half = left / 2;
      key += half * static_cast<std::size_t>(key[half - 1] < entry.first);
      left -= half;
    }
    auto k =
        static_cast<std::size_t>(key - keys_.data()) + static_cast<std::size_t>(*key < entry.first);
    while (k < positives_.size() && !(entry < positives_[k]))
      ++k;  // ties
    return k;
  }

  const Problem<Real>& problem_;
  const IdentityIndex& index_;
  const Scores& scores_;
  std::vector<Entry> positives_;
  std::vector<Entry> junk_;
  std::vector<Real> keys_;           // distances of the positives
  std::vector<std::int64_t> ahead_;  // entries ranked ahead of each positive
};

}  // namespace

template <typename Real>
Place rank(const Problem<Real>& problem, const Scores& scores, int threads) {
  const IdentityIndex index(problem.gallery_identities, problem.num_gallery);
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  Place bad{-1, -1};
  std::exception_ptr failure;

  const auto work = [&] {
    try {
      RowRanker<Real> ranker(problem, index, scores);
      for (std::int64_t q; (q = next.fetch_add(1)) < problem.num_queries;) {
        const std::int64_t column = ranker(q);
        if (column < 0)
          continue;
        const std::lock_guard lock(mutex);
        if (bad.row < 0 || q < bad.row)
          bad = {q, column};
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!failure)
        failure = std::current_exception();
    }
  };

  std::int64_t wanted = threads;
  if (wanted < 1)
    wanted = std::max(1u, std::thread::hardware_concurrency());
  wanted = std::min(wanted, problem.num_queries);
  std::vector<std::thread> helpers;
  for (std::int64_t t = 1; t < wanted; ++t) {
    try {
      helpers.emplace_back(work);
    } catch (const std::exception&) {
      break;  // the system gives no more threads; those there are do all the work
    }
  }
  work();
  for (std::thread& helper : helpers)
    helper.join();
  if (failure)
    std::rethrow_exception(failure);
  return bad;
}

template Place rank<float>(const Problem<float>&, const Scores&, int);
template Place rank<double>(const Problem<double>&, const Scores&, int);

}  // namespace gsalign::ranking
