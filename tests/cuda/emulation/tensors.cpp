// Tensors on the CPU between guard pages, so that a kernel's access beyond one is found.
#undef TORCH_TARGET_VERSION  // which hides what is not of the stable interface
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include "memory.h"

namespace lstm_fused::cuda {
namespace {

// Stays torch's allocator once it is: torch frees some memory by whichever is its allocator then.
class MaybeGuarded final : public c10::Allocator {
 public:
  static c10::Allocator* unguarded() {
    static c10::Allocator* const before = c10::GetCPUAllocator();
    return before;
  }

  bool guards = false;

  c10::DataPtr allocate(size_t bytes) override {
    if (!guards || bytes == 0) return unguarded()->allocate(bytes);
    void* p = allocate_guarded(static_cast<int64_t>(bytes));
    return {p, p, &free, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void free(void* p) {
    if (!free_guarded(p)) unguarded()->raw_deallocate(p);
  }
};

}  // namespace

// For Python: whether tensors are guarded from now on. Returns the damage of those before, or null.
extern "C" __attribute__((visibility("default"))) const char* lstm_fused_emulation_guard(bool on) {
  static MaybeGuarded allocator;
  MaybeGuarded::unguarded();
  allocator.guards = on;
  c10::SetCPUAllocator(&allocator);
  return damage_of_allocations();
}

}  // namespace lstm_fused::cuda
