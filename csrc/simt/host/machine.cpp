// The emulated device, and the text of errors.

#include "machine.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace ldmi::simt {
namespace host {

Context* context = nullptr;

std::string text(const char* format, ...) {
  char line[1000];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof(line), format, arguments);
  va_end(arguments);
  return line;
}
std::string name_of(const Site& site) {
  const char* file = site.file_name();
  if (const char* slash = std::strrchr(file, '/')) file = slash + 1;
  return text("%s:%u", file, static_cast<unsigned>(site.line()));
}
bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void fail(const std::string& message) {
  Machine& m = machine();
  if (m.current == nullptr || m.current == &m.launcher) {
    throw Error(message + text(" (seed %llu)", static_cast<unsigned long long>(m.seed)));
  }
  m.error = text("block %lld, thread %d: ", number(m.current->block), m.current->thread) + message;
  throw Abandoned();
}

Machine::Machine() {
  const char* const text_seed = std::getenv("LDMI_SIMT_SEED");
  start(text_seed == nullptr ? 0 : std::strtoull(text_seed, nullptr, 0));
}

void Machine::start(uint64_t new_seed) {
  seed = new_seed;
  random.state = ~new_seed;  // other numbers than those that a case draws from the same seed
  static constexpr struct {
    int capability;
    int64_t block, sm;
  } kinds[] = {
      {80, 163 * 1024, 164 * 1024}, {90, 227 * 1024, 228 * 1024}, {100, 227 * 1024, 228 * 1024}, {120, 99 * 1024, 100 * 1024}};
  const auto& kind = kinds[random.below(4)];
  device = {1 + static_cast<int>(random.below(6)), kind.block, kind.sm, int64_t{1} << 20, kind.capability};
  occupancy = 1 + static_cast<int>(random.below(3));
  if (const char* sms = std::getenv("LDMI_SIMT_SMS")) device.sms = static_cast<int>(std::strtol(sms, nullptr, 0));
}

void set_seed(uint64_t seed) { machine().start(seed); }
void set_device(const Device& device) { machine().device = device; }

}  // namespace host

namespace detail {
int blocks_per_sm(int threads, size_t smem) {
  const host::Machine& m = host::machine();
  const size_t by_smem = static_cast<size_t>(m.device.smem_sm) / (smem + 1024),
               by_threads = 2048 / static_cast<size_t>(std::max(threads, 1));
  return static_cast<int>(std::min({by_smem, by_threads, static_cast<size_t>(m.occupancy)}));
}
}  // namespace detail

int device(Device* out) {
  *out = host::machine().device;
  return 0;
}

const char* error_text(int error) {
  switch (error) {
    case 0:
      return "no error";
    case 1:
      return "invalid argument: more shared memory than a block can have";
    case 9:
      return "invalid configuration of blocks, threads or clusters";
    case 701:
      return "too many resources requested for launch";
    case 720:
      return "too many blocks in cooperative launch";
    default:
      return "unknown error";
  }
}

}  // namespace ldmi::simt
