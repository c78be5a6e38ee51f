// What the programs that run CUDA kernels on the host share: files of cases and results, poisoned
// memory, and the faults asked for on the command line.
//
// Include it after the kernels, which bring host_launch.h.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace gsalign::host {

inline std::FILE* open_file(const char* path, const char* mode) {
  std::FILE* file = std::fopen(path, mode);
  if (file == nullptr) {
    std::fprintf(stderr, "cannot open %s\n", path);
    std::exit(2);
  }
  return file;
}

template <typename V>
void read(std::FILE* file, V* values, std::size_t count) {
  if (count > 0 && std::fread(values, sizeof(V), count, file) != count) {
    std::fprintf(stderr, "the case file ends too early\n");
    std::exit(2);
  }
}

template <typename V>
std::vector<V> read_values(std::FILE* file, std::size_t count) {
  std::vector<V> values(count);
  read(file, values.data(), count);
  return values;
}

template <typename V>
void write(std::FILE* file, const V* values, std::size_t count) {
  if (count > 0 && std::fwrite(values, sizeof(V), count, file) != count) {
    std::fprintf(stderr, "cannot write the results\n");
    std::exit(2);
  }
}

// Features are float32 in files.
template <typename T>
std::vector<T> narrow(const std::vector<float>& values) {
  std::vector<T> result(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    result[i] = from_float<T>(values[i]);
  }
  return result;
}

template <typename T>
void write_widened(std::FILE* file, const std::vector<T>& values) {
  std::vector<float> result(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    result[i] = to_float(values[i]);
  }
  write(file, result.data(), result.size());
}

// Memory that nothing has written yet, recognisable: every bit set, which is a NaN in every type.
template <typename T>
std::vector<T> poisoned(std::size_t count) {
  std::vector<T> values(count);
  if (count > 0) {
    std::memset(static_cast<void*>(values.data()), 0xff, count * sizeof(T));
  }
  return values;
}

// Keeps the result of the first run; a later one that differs by one bit ends the program with 3.
template <typename T>
void keep_first(std::vector<T>& first, std::vector<T> now, bool is_first) {
  if (is_first) {
    first = std::move(now);
  } else if (!now.empty() && std::memcmp(first.data(), now.data(), now.size() * sizeof(T)) != 0) {
    std::fprintf(stderr, "two runs differ\n");
    std::exit(3);
  }
}

// DRIVER CASES RESULTS [--skip-barrier N] [--missing-shared BYTES] [--launch N]: reads headers
// until the cases end and hands each to run_case(cases, results, header). The faults are those of
// host_launch.h.
template <typename Header, typename RunCase>
int run_cases(int argc, char** argv, RunCase run_case) {
  if (argc < 3) {
    std::fprintf(
        stderr,
        "usage: %s CASES RESULTS [--skip-barrier N] [--missing-shared BYTES] [--launch N]\n",
        argv[0]);
    return 2;
  }
  for (int i = 3; i + 1 < argc; i += 2) {
    const std::string option = argv[i];
    int& fault = option == "--skip-barrier"     ? faults.skipped_barrier
                 : option == "--missing-shared" ? faults.missing_shared
                                                : faults.launch;
    fault = std::atoi(argv[i + 1]);
  }
  std::FILE* cases = open_file(argv[1], "rb");
  std::FILE* results = open_file(argv[2], "wb");
  Header header{};
  while (std::fread(&header, sizeof(header), 1, cases) == 1) {
    run_case(cases, results, header);
  }
  std::fclose(cases);
  std::fclose(results);
  return 0;
}

}  // namespace gsalign::host
