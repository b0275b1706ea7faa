// The fibers: switching between them, their stacks, and the schedule that picks the next.

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "machine.h"

#if defined(LDMI_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(LDMI_SIMT_UCONTEXT)
// Saves the callee-saved registers on the stack that it leaves, and restores them from the stack that it enters.
asm(R"(
.text
.globl ldmi_simt_switch
.type ldmi_simt_switch, @function
ldmi_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ldmi_simt_switch, .-ldmi_simt_switch
)");
extern "C" void ldmi_simt_switch(void** leave, void* enter);
#endif

namespace ldmi::simt::host {
namespace {

constexpr size_t kStack = 256 * 1024;

#if !defined(LDMI_SIMT_UCONTEXT)
void jump(Fiber& from, Fiber& to) { ldmi_simt_switch(&from.stack_pointer, to.stack_pointer); }
#else
void jump(Fiber& from, Fiber& to) { swapcontext(&from.registers, &to.registers); }
#endif

#if defined(LDMI_SIMT_ASAN)
// The bounds of the stack that was left are known on arrival; those of the launcher change from launch to launch.
void arrived() {
  Machine& m = machine();
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(m.current->fake_stack, &bottom, &size);
  if (m.launcher.stack == nullptr) {
    m.launcher.stack = static_cast<unsigned char*>(const_cast<void*>(bottom));
    m.launcher.stack_size = size;
  }
}
#else
void arrived() {}
#endif

void enter_fiber() {
  arrived();
  Machine& m = machine();
  try {
    m.body(m.arguments);
    m.end_thread();
  } catch (const Abandoned&) {
  } catch (const std::exception& problem) {
    m.error = std::string("a kernel threw: ") + problem.what();
  }
  m.switch_to(&m.launcher);
  std::abort();  // not reached: a thread that has failed is never resumed
}

}  // namespace

void Machine::switch_to(Fiber* next) {
  Fiber* const from = current;
  if (next == from) return;
  current = next;
  context = next == &launcher ? nullptr : next;
#if defined(LDMI_SIMT_ASAN)
  __sanitizer_start_switch_fiber(from->state == State::kDone ? nullptr : &from->fake_stack, next->stack, next->stack_size);
#endif
  jump(*from, *next);
  arrived();
}

// Leaves the current fiber, which waits or is in a list of ready fibers, for another.
void Machine::resume_next() {
  if (ready.empty() && ready_late.empty()) {
    error = "deadlock: no thread can continue\n" + who_waits();
    switch_to(&launcher);
    return;
  }
  std::vector<Fiber*>& from = ready.empty() ? ready_late : ready;
  const size_t pick = random.one_in(newest_first) ? from.size() - 1 : random.below(from.size());
  Fiber* const next = from[pick];
  from[pick] = from.back();
  from.pop_back();
  switch_to(next);
}

#if !defined(LDMI_SIMT_UCONTEXT)
void prepare(Fiber& fiber) {
  auto* top = reinterpret_cast<uint64_t*>(fiber.stack + fiber.stack_size);
  *--top = 0;  // enter_fiber has no return address
  *--top = reinterpret_cast<uint64_t>(&enter_fiber);
  for (int i = 0; i < 6; ++i) *--top = 0;  // the registers
  fiber.stack_pointer = top;
}
#else
void prepare(Fiber& fiber) {
  getcontext(&fiber.registers);
  fiber.registers.uc_stack.ss_sp = fiber.stack;
  fiber.registers.uc_stack.ss_size = fiber.stack_size;
  fiber.registers.uc_link = nullptr;
  makecontext(&fiber.registers, &enter_fiber, 0);
}
#endif

Fiber* new_fiber(Machine& m) {
  if (!m.unused.empty()) {
    Fiber* const fiber = m.unused.back();
    m.unused.pop_back();
    return fiber;
  }
  m.all.push_back(std::make_unique<Fiber>());
  Fiber* const fiber = m.all.back().get();
  const size_t page = 4096;
  void* const memory =
      mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  fiber->stack = static_cast<unsigned char*>(memory) + page;
  fiber->stack_size = kStack;
  return fiber;
}

}  // namespace ldmi::simt::host
