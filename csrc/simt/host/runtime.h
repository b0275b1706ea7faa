// The runtime of the emulator, as the device vocabulary (device.h) calls it and the tests set it up. Its state is in machine.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

namespace ldmi::simt::host {

// Thrown by launch(): what went wrong in a kernel, where, and under which seed.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Site = std::source_location;

// The indices of a CUDA thread.
struct Context {
  int thread = 0, threads = 0;
  int64_t block = 0, blocks = 0;
};
extern Context* context;  // of the thread that runs now; null in host code

// Sets the seed of everything random from here on: the device, the schedules and the delays. Error messages name it.
void set_seed(uint64_t seed);

// Global memory: `size` bytes from `begin` on, in an allocation whose other bytes are a redzone with the pattern of fill_redzone.
// `shadow` has one byte per byte: kUnset, kSet, or kWritten (by the launch that is running).
enum : uint8_t { kUnset, kSet, kWritten };
struct Region {
  unsigned char* begin = nullptr;
  size_t size = 0;
  uint8_t* shadow = nullptr;
  unsigned char* allocation = nullptr;
  size_t allocated = 0;
  std::string name;
};
void add_region(const Region& region);
void remove_region(const unsigned char* begin);
void fill_redzone(unsigned char* begin, size_t size);

enum class Load { kPlain, kReadOnly };

// Each of these is one access or one wait of the current thread.
void read_global(const void* p, size_t size, void* out, Load kind, Site site);
void write_global(void* p, size_t size, const void* value, Site site);
void atomic_read(void* p, size_t size, void* out, Site site);  // an atomic_write to the same address follows
void atomic_write(void* p, size_t size, const void* value);
void shared_access(const void* p, size_t size, Site site);  // checks the access, and may let other threads run
void* take_shared(int carve, int piece, size_t offset, size_t bytes, Site site);
int new_carve();
int barrier_block(const char* what, int vote, Site site);
void barrier_cluster(Site site);
void barrier_grid(Site site);
void* map_to_rank(const void* p, int rank, Site site);
void fence();
void copy(void* shared, const void* global, int bytes, int valid, Site site);
void commit();
void wait(int groups);

// A warp collective: once all lanes of the mask have arrived, `run` computes the outputs from the inputs, one of each per lane.
using Run = void (*)(unsigned mask, const void* const* in, void* const* out);
void collective(const char* what, unsigned mask, const void* in, void* out, Run run, Site site);

}  // namespace ldmi::simt::host
