// What the cases share, for both builds (the shim on a CPU, nvcc for a GPU): buffers of global memory with redzones, random numbers,
// comparison within an error budget, and main(). A case fails by throwing; run() prints what and exits with 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/simt.cuh"
#include "../csrc/random.h"

namespace ldmi::test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void require(bool condition, const std::string& message) {
  if (!condition) throw Failure(message);
}

// Fails unless a launch, or whatever else returns such a code, succeeded.
inline void require_success(int error, const char* what) {
  if (error != 0) throw Failure(std::string(what) + ": " + simt::error_text(error));
}

// Waits for the launches so far, and fails if one went wrong.
inline void synchronize() {
#ifdef __CUDACC__
  require_success(static_cast<int>(cudaDeviceSynchronize()), "kernel");
#endif
}

inline constexpr bool kEmulated =
#ifdef __CUDACC__
    false;
#else
    true;
#endif

// `count` values of global memory, not initialised unless given, exactly as large as said: on the CPU every access outside, and
// every use of what nobody wrote, is an error that names the buffer; on a GPU a write outside is found by download().
// `lead` moves the first value off the alignment of 256 bytes, by so many values.
template <class T>
class Buffer {
 public:
  Buffer(int64_t count, std::string name, int64_t lead = 0) : count_(count), lead_(lead), name_(std::move(name)) {
    const size_t inside = bytes(), before = kRedzone + static_cast<size_t>(lead) * sizeof(T);
    allocated_ = (before + inside + 2 * kRedzone - 1) / kRedzone * kRedzone;
#ifdef __CUDACC__
    require_success(static_cast<int>(cudaMalloc(reinterpret_cast<void**>(&allocation_), allocated_)), "cudaMalloc");
    require_success(static_cast<int>(cudaMemset(allocation_, kFill, allocated_)), "cudaMemset");
#else
    allocation_ = static_cast<unsigned char*>(std::aligned_alloc(kRedzone, allocated_));
    require(allocation_ != nullptr, "out of memory");
    simt::host::fill_redzone(allocation_, allocated_);
    std::memset(allocation_ + before, kFill, inside);
    shadow_.assign(inside, simt::host::kUnset);
    simt::host::add_region({allocation_ + before, inside, shadow_.data(), allocation_, allocated_, name_});
#endif
    data_ = reinterpret_cast<T*>(allocation_ + before);
  }
  Buffer(const std::vector<T>& values, std::string name, int64_t lead = 0)
      : Buffer(static_cast<int64_t>(values.size()), std::move(name), lead) {
    upload(values);
  }
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(allocation_);
#else
    simt::host::remove_region(reinterpret_cast<unsigned char*>(data_));
    std::free(allocation_);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_; }
  int64_t size() const { return count_; }
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }

  void upload(const std::vector<T>& values) {
    require(static_cast<int64_t>(values.size()) == count_, "upload to " + name_ + ": wrong size");
    if (count_ == 0) return;
#ifdef __CUDACC__
    require_success(static_cast<int>(cudaMemcpy(data_, values.data(), bytes(), cudaMemcpyHostToDevice)), "upload");
#else
    std::memcpy(static_cast<void*>(data_), values.data(), bytes());
    shadow_.assign(shadow_.size(), simt::host::kSet);
#endif
  }
  // All values; fails if one was never written (on the CPU), or something was written outside.
  std::vector<T> download() const {
    std::vector<T> values(static_cast<size_t>(count_));
#ifdef __CUDACC__
    std::vector<unsigned char> all(allocated_);
    require_success(static_cast<int>(cudaMemcpy(all.data(), allocation_, allocated_, cudaMemcpyDeviceToHost)), "download");
    const size_t before = kRedzone + static_cast<size_t>(lead_) * sizeof(T);
    for (size_t i = 0; i < allocated_; ++i) {
      const bool outside = i < before || i >= before + bytes();
      if (outside && all[i] != kFill) {
        throw Failure("something wrote outside " + name_ + ", at byte " +
                      std::to_string(static_cast<long long>(i) - static_cast<long long>(before)));
      }
    }
    std::memcpy(static_cast<void*>(values.data()), all.data() + before, bytes());
#else
    for (size_t i = 0; i < shadow_.size(); ++i) {
      if (shadow_[i] == simt::host::kUnset) throw Failure("nobody wrote value " + std::to_string(i / sizeof(T)) + " of " + name_);
    }
    if (count_ != 0) std::memcpy(static_cast<void*>(values.data()), data_, bytes());
#endif
    return values;
  }

 private:
  static constexpr size_t kRedzone = 256;
  static constexpr unsigned char kFill = 0xff;  // NaN, -1
  int64_t count_, lead_;
  std::string name_;
  unsigned char* allocation_ = nullptr;
  size_t allocated_ = 0;
  T* data_ = nullptr;
#ifndef __CUDACC__
  std::vector<uint8_t> shadow_;
#endif
};

// Fails unless |got - want| <= absolute + relative * |want| for each value; NaN equals NaN, an infinity itself.
template <class A, class B>
void require_close(const std::vector<A>& got, const std::vector<B>& want, double absolute, double relative, const char* what) {
  require(got.size() == want.size(), std::string(what) + ": sizes differ");
  for (size_t i = 0; i < got.size(); ++i) {
    const double g = static_cast<double>(got[i]), w = static_cast<double>(want[i]);
    if (g == w || (std::isnan(g) && std::isnan(w))) continue;
    const double budget = absolute + relative * std::fabs(w);
    if (std::fabs(g - w) <= budget) continue;  // false for NaN
    char line[300];
    std::snprintf(line, sizeof(line), "%s: value %zu of %zu is %.17g, expected %.17g within %.3g", what, i, got.size(), g, w, budget);
    throw Failure(line);
  }
}
template <class A, class B>
void require_equal(const std::vector<A>& got, const std::vector<B>& want, const char* what) {
  require_close(got, want, 0.0, 0.0, what);
}

// The command line: --seed S --iterations N, and any other `--name value` or `--name`, for flag() and value().
class Options {
 public:
  Options(int count, char** words) {
    for (int i = 1; i < count; ++i) words_.emplace_back(words[i]);
    seed = static_cast<uint64_t>(std::strtoull(value("seed", "1").c_str(), nullptr, 0));
    iterations = std::strtoll(value("iterations", "10").c_str(), nullptr, 0);
  }
  bool flag(const std::string& name) const {
    for (const std::string& word : words_) {
      if (word == "--" + name) return true;
    }
    return false;
  }
  std::string value(const std::string& name, const std::string& otherwise) const {
    for (size_t i = 0; i + 1 < words_.size(); ++i) {
      if (words_[i] == "--" + name) return words_[i + 1];
    }
    return otherwise;
  }
  uint64_t seed = 1;
  int64_t iterations = 10;

 private:
  std::vector<std::string> words_;
};

// Starts the emulated device, schedule and delays that belong to the seed; a GPU has its own.
inline void set_seed(uint64_t seed) {
#ifdef __CUDACC__
  static_cast<void>(seed);
#else
  simt::host::set_seed(seed);
#endif
}

// The body of main(): the case with each seed from --seed on, --iterations of them. 0 if none threw, else 1 and the reason on stderr.
template <class Case>
int run(const char* name, const Options& options, Case&& check) {
  for (int64_t i = 0; i < options.iterations; ++i) {
    const uint64_t seed = options.seed + static_cast<uint64_t>(i);
    try {
      set_seed(seed);
      Random random(seed);
      check(random);
      synchronize();
    } catch (const std::exception& problem) {
      std::fprintf(stderr, "%s: --seed %llu: %s\n", name, static_cast<unsigned long long>(seed), problem.what());
      return 1;
    }
  }
  std::printf("%s: %lld seeds pass\n", name, static_cast<long long>(options.iterations));
  return 0;
}

}  // namespace ldmi::test
