#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace lstm_fused::cuda {
namespace {

constexpr int64_t kBytesBefore = 64, kMaxAlignment = 128;
constexpr int kCanary = 0x5a;
constexpr int64_t kVectorBytes = 16;

const int64_t kPage = sysconf(_SC_PAGESIZE);

// Never destroyed: tensors may be freed after them.
struct State {
  std::mutex mutex;
  std::map<void*, std::unique_ptr<GuardedMemory>> allocations;
  std::map<int64_t, std::vector<std::unique_ptr<GuardedMemory>>> spare;  // by capacity
  const char* damage = nullptr;  // of allocations that were freed
};
State& state() {
  static State* const s = new State;
  return *s;
}

bool is_damaged(const char* from, int64_t bytes) {
  static const std::vector<char> intact(std::max(kBytesBefore, kMaxAlignment), kCanary);
  return std::memcmp(from, intact.data(), bytes) != 0;
}

int64_t capacity_of_pages(int64_t bytes) {
  return (bytes + kBytesBefore + kPage - 1) / kPage * kPage - kBytesBefore;
}

}  // namespace

GuardedMemory::GuardedMemory(int64_t capacity) : capacity_(capacity_of_pages(capacity)) {
  const size_t bytes = capacity_ + kBytesBefore + 2 * kPage;
  void* p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) std::abort();
  pages_ = static_cast<char*>(p) + kPage;
  end_ = pages_ + capacity_ + kBytesBefore;
  if (mprotect(pages_, end_ - pages_, PROT_READ | PROT_WRITE) != 0) std::abort();
}

GuardedMemory::~GuardedMemory() {
  munmap(pages_ - kPage, end_ - pages_ + 2 * kPage);
}

char* GuardedMemory::take(int64_t bytes, int64_t alignment) {
  begin_ = end_ - (bytes + alignment - 1) / alignment * alignment;
  bytes_ = bytes;
  if (begin_ - kBytesBefore < pages_) std::abort();
  std::memset(begin_ - kBytesBefore, kCanary, kBytesBefore);
  std::memset(begin_, 0xff, bytes);
  std::memset(begin_ + bytes, kCanary, end_ - begin_ - bytes);
  return begin_;
}

const char* GuardedMemory::damage() const {
  if (is_damaged(begin_ - kBytesBefore, kBytesBefore)) return "a write before memory begins";
  return is_damaged(begin_ + bytes_, end_ - begin_ - bytes_) ? "a write after memory ends"
                                                             : nullptr;
}

std::unique_ptr<GuardedMemory> borrow_memory(int64_t capacity) {
  {
    const std::lock_guard lock(state().mutex);
    auto& spare = state().spare[capacity_of_pages(capacity)];
    if (!spare.empty()) {
      std::unique_ptr<GuardedMemory> memory = std::move(spare.back());
      spare.pop_back();
      return memory;
    }
  }
  return std::make_unique<GuardedMemory>(capacity);
}

void give_back(std::unique_ptr<GuardedMemory> memory) {
  const std::lock_guard lock(state().mutex);
  state().spare[memory->capacity()].push_back(std::move(memory));
}

const char* damage_of_allocations() {
  const std::lock_guard lock(state().mutex);
  const char* damage = std::exchange(state().damage, nullptr);
  for (const auto& [p, memory] : state().allocations)
    if (!damage) damage = memory->damage();
  return damage;
}

void* allocate_guarded(int64_t bytes) {
  std::unique_ptr<GuardedMemory> memory = borrow_memory(bytes + kVectorBytes);
  char* const p = memory->take(bytes, kVectorBytes);
  const std::lock_guard lock(state().mutex);
  state().allocations.emplace(p, std::move(memory));
  return p;
}

bool free_guarded(void* p) {
  std::unique_ptr<GuardedMemory> memory;
  {
    const std::lock_guard lock(state().mutex);
    const auto found = state().allocations.find(p);
    if (found == state().allocations.end()) return false;
    memory = std::move(found->second);
    if (const char* damage = memory->damage()) state().damage = damage;
    state().allocations.erase(found);
  }
  give_back(std::move(memory));
  return true;
}

}  // namespace lstm_fused::cuda
