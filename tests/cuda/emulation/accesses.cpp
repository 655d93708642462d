// The order in which CTAs see each other's writes to global memory. A CTA sees what another one has
// written in the same launch once that one has released it, at a barrier, and this one has acquired
// it there: before, a store may be under way and a load may find an old line in L1. An access that
// comes too early fails. At the granularity of CTAs: the thread sanitizer looks at their threads.
//
// Kernels are compiled for the thread sanitizer and call the functions below before each access,
// where the sanitizer itself is not linked.
#include <algorithm>
#include <map>
#include <memory>

#include "state.h"

namespace lstm_fused::cuda::fibers {
namespace {

#if defined(LSTM_FUSED_TSAN)
constexpr bool kChecks = false;
#else
constexpr bool kChecks = true;
#endif

constexpr uintptr_t kPageBytes = 4096, kGranule = 2;  // no value is smaller that a kernel writes
constexpr size_t kCached = 256;

// The last write to two bytes: cta and epoch are those of the writer.
struct Write {
  uint64_t launch : 24, cta : 16, epoch : 24;
};
struct Page {
  Write writes[kPageBytes / kGranule] = {};
};

std::map<uintptr_t, std::unique_ptr<Page>> pages;
struct Cached {
  uintptr_t number = 0;
  Page* page = nullptr;  // null where nothing was written
} cache[kCached];
uint32_t launch_number = 0;
std::map<const void*, Epochs> counters;

// Null if there is none and it is not to be made.
Page* page_of(uintptr_t address, bool make) {
  const uintptr_t number = address / kPageBytes;
  Cached& cached = cache[number % kCached];
  if (cached.number != number || (make && !cached.page)) {
    const auto found = pages.find(number);
    Page* page = found == pages.end() ? nullptr : found->second.get();
    if (!page && make) page = (pages[number] = std::make_unique<Page>()).get();
    cached = {number, page};
  }
  return cached.page;
}

void merge(Epochs& to, const Epochs& from) {
  if (to.size() < from.size()) to.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

bool sees(const Block& b, const Write& w) {
  if (w.cta == (b.number & 0xffff)) return true;
  const size_t at = w.cta - b.first;
  return at < b.epochs.size() && b.epochs[at] >= w.epoch;
}

void check(uintptr_t address, size_t bytes, bool writes) {
  Page* page = page_of(address, writes);
  if (!page) return;
  const Block& b = *current->block;
  const uint64_t launch = launch_number & 0xffffff;
  for (size_t i = 0; i < bytes; i += kGranule) {
    Write& w = page->writes[(address + i) % kPageBytes / kGranule];
    if (w.launch == launch && !sees(b, w))
      fail(writes ? "a write over what another CTA wrote, unordered"
                  : "a read of what another CTA wrote, before it is released and acquired");
    if (writes)
      w = {launch, b.number & 0xffffu, b.epochs.empty() ? 0 : b.epochs[b.number - b.first]};
  }
}

}  // namespace

OwnMemory own_memory;

void on_access(const void* p, size_t bytes, bool writes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (!kChecks || at - own_memory.stack < kStackBytes ||
      at - own_memory.shared < own_memory.shared_bytes || !current)
    return;
  for (size_t done = 0; done < bytes;) {
    const size_t left = std::min<size_t>(bytes - done, kPageBytes - (at + done) % kPageBytes);
    check(at + done, left, writes);
    done += left;
  }
}

void begin_launch() {
  ++launch_number;
  counters.clear();
}
void release(Epochs& to) {
  Block& b = *current->block;
  if (!kChecks || b.epochs.empty()) return;
  merge(to, b.epochs);
  ++b.epochs[b.number - b.first];
}
void acquire(const Epochs& from) {
  if (kChecks && !current->block->epochs.empty()) merge(current->block->epochs, from);
}
Epochs& epochs_of(const void* counter) {
  return counters[counter];
}

}  // namespace lstm_fused::cuda::fibers

#if !defined(LSTM_FUSED_TSAN)
using lstm_fused::cuda::fibers::on_access;

#define LSTM_FUSED_ACCESS(bytes)                \
  void __tsan_read##bytes(void* p) {            \
    on_access(p, bytes, false);                 \
  }                                             \
  void __tsan_write##bytes(void* p) {           \
    on_access(p, bytes, true);                  \
  }                                             \
  void __tsan_unaligned_read##bytes(void* p) {  \
    on_access(p, bytes, false);                 \
  }                                             \
  void __tsan_unaligned_write##bytes(void* p) { \
    on_access(p, bytes, true);                  \
  }

extern "C" {
void __tsan_init() {}
LSTM_FUSED_ACCESS(1)
LSTM_FUSED_ACCESS(2)
LSTM_FUSED_ACCESS(4)
LSTM_FUSED_ACCESS(8)
LSTM_FUSED_ACCESS(16)
void __tsan_read_range(void* p, size_t bytes) {
  on_access(p, bytes, false);
}
void __tsan_write_range(void* p, size_t bytes) {
  on_access(p, bytes, true);
}
}
#endif
