// The names of ../launch.cuh for a compiler without CUDA. Only launch.cuh includes this file.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "runtime.h"

namespace ldmi::simt {

using Stream = void*;  // a launch has finished when it returns

namespace host {
// The device to emulate, instead of the one drawn from the seed.
void set_device(const Device& device);
int run_grid(const Grid& grid, void (*body)(const void*), const void* arguments);
}  // namespace host

int device(Device* out);
const char* error_text(int error);
int zero(void* p, size_t bytes, Stream stream);

namespace detail {
int blocks_per_sm(int threads, size_t smem);
}
template <class... P>
int blocks_per_sm(void (*)(P...), int threads, size_t smem, int* out) {
  *out = detail::blocks_per_sm(threads, smem);
  return 0;
}

template <class... P, class... A>
int launch(void (*kernel)(P...), const Grid& grid, Stream, A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  const Call call{kernel, std::tuple<P...>(static_cast<P>(std::forward<A>(arguments))...)};
  const auto body = [](const void* p) {
    const Call& it = *static_cast<const Call*>(p);
    std::apply(it.kernel, it.arguments);
  };
  return host::run_grid(grid, body, &call);
}

}  // namespace ldmi::simt
