// Memory between guard pages, for the shared memory of CTAs and for tensors. It ends where the last
// page does, up to its alignment: an access further on faults, and a write to the bytes between, or
// just before the memory, is found by damage().
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace lstm_fused::cuda {

class GuardedMemory {
 public:
  explicit GuardedMemory(int64_t capacity);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  int64_t capacity() const { return capacity_; }
  // The last `bytes` bytes, at most the capacity, all 0xff: NaN in every dtype. What was taken
  // before is given up.
  char* take(int64_t bytes, int64_t alignment);
  // What was written outside of the taken bytes, or null.
  const char* damage() const;

 private:
  int64_t capacity_, bytes_ = 0;
  char *pages_, *end_, *begin_ = nullptr;
};

// Memory of at least this capacity, which may have been in use before, until it is given back.
std::unique_ptr<GuardedMemory> borrow_memory(int64_t capacity);
void give_back(std::unique_ptr<GuardedMemory> memory);

// The damage of memory of allocate_guarded that there is or was since the last call, or null.
const char* damage_of_allocations();

// For the vectors of a program. Their ends are aligned as vector instructions need it.
template <class T>
struct GuardedAllocator {
  using value_type = T;
  GuardedAllocator() = default;
  template <class U>
  GuardedAllocator(const GuardedAllocator<U>&) {}

  T* allocate(size_t count);
  void deallocate(T* p, size_t);
  bool operator==(const GuardedAllocator&) const { return true; }
};

void* allocate_guarded(int64_t bytes);
bool free_guarded(void* p);  // false where p is not of allocate_guarded

template <class T>
T* GuardedAllocator<T>::allocate(size_t count) {
  return static_cast<T*>(allocate_guarded(static_cast<int64_t>(count * sizeof(T))));
}
template <class T>
void GuardedAllocator<T>::deallocate(T* p, size_t) {
  free_guarded(p);
}

}  // namespace lstm_fused::cuda
