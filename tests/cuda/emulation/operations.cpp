// What a fiber calls of fibers.h: the barriers, copies, stores and instructions of a CUDA thread.
#include <algorithm>
#include <cstring>

#include "state.h"

namespace lstm_fused::cuda::fibers {
namespace {

// Returns the generation that is_waiting takes.
unsigned arrive(Barrier& b) {
  const unsigned generation = b.generation;
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    ++b.generation;
  }
  progress = true;
  return generation;
}
// The scheduler does not resume the fiber before.
void wait_until_past(const Barrier& b, unsigned generation) {
  while (is_waiting(b, generation)) {
    current->waits_for = &b;
    current->generation = generation;
    yield();
  }
  current->waits_for = nullptr;
}
char* address_of(Barrier& b) {
  return &b.addresses[b.generation & 1];
}

// synchronize: whether the barrier orders memory accesses.
void arrive_and_wait(Barrier& b, bool synchronize) {
  char* address = address_of(b);
  if (synchronize) tsan_release(address);
  wait_until_past(b, arrive(b));
  if (synchronize) tsan_acquire(address);
}

// All lanes of a warp must be at the same instruction.
void arrive_and_wait(Warp& warp, const char* instruction, bool synchronize) {
  if (warp.barrier.arrived == 0) warp.instruction = instruction;
  if (std::strcmp(warp.instruction, instruction) != 0)
    fail("the lanes of a warp are at different instructions");
  arrive_and_wait(warp.barrier, synchronize);
}

Warp& own_warp() {
  return current->block->warps[current->thread / 32];
}

}  // namespace

int thread_index() {
  return current->thread;
}
int thread_count() {
  return grid.threads;
}
dim3 block_index() {
  return current->block->index;
}
dim3 block_count() {
  return grid.blocks;
}
int cluster_rank() {
  return current->block->rank;
}
int cluster_size() {
  return static_cast<int>(current->block->cluster->blocks.size());
}
char* shared_memory(int rank) {
  return current->block->cluster->blocks[rank].shared;
}

void sync_block() {
  if (!is_off("block")) arrive_and_wait(current->block->barrier, true);
}
void sync_warp() {
  arrive_and_wait(own_warp(), "syncwarp", true);
}
static void check_shared_of(const Block& block, const void* p, int bytes) {
  const int64_t at = static_cast<const char*>(p) - block.shared;
  if (at < 0 || at + bytes > grid.shared_bytes) fail("an access outside of shared memory");
  if (at % bytes != 0) fail("a misaligned access to shared memory");
}
void check_shared(const void* p, int bytes) {
  check_shared_of(*current->block, p, bytes);
}

void cluster_barrier_arrive() {
  if (is_off("cluster")) return;
  if (current->arrived_at_cluster) fail("a thread arrives twice at the cluster's barrier");
  current->arrived_at_cluster = true;
  Barrier& b = current->block->cluster->barrier;
  release(current->block->cluster->epochs);
  current->cluster_address = address_of(b);
  tsan_release(current->cluster_address);
  current->cluster_generation = arrive(b);
}
void cluster_barrier_wait() {
  if (is_off("cluster")) return;
  if (!current->arrived_at_cluster) fail("a thread waits for a barrier that it has not arrived at");
  wait_until_past(current->block->cluster->barrier, current->cluster_generation);
  current->arrived_at_cluster = false;
  acquire(current->block->cluster->epochs);
  tsan_acquire(current->cluster_address);
}

static void increment(unsigned long long* counter) {
  ++*counter;
  progress = true;
}
static bool is_below(const unsigned long long* counter, unsigned long long target) {
  return *counter < target;
}

void add_to_counter(unsigned long long* counter) {
  if (is_off("counter")) return;
  tsan_release(counter);
  release(epochs_of(counter));
  increment(counter);
}
void wait_for_counter(unsigned long long* counter, unsigned long long target) {
  if (is_off("counter")) return;
  while (is_below(counter, target)) yield();
  acquire(epochs_of(counter));
  tsan_acquire(counter);
}

// In shared memory.
struct Mbarrier {
  int32_t bytes;  // that are to come
  uint16_t armed, phase;
};
static_assert(sizeof(Mbarrier) == 8);

static Mbarrier& mbarrier_at(void* p) {
  Mbarrier& b = *static_cast<Mbarrier*>(p);
  if (b.armed > 1) fail("an mbarrier that is not initialized");
  return b;
}
static void count_bytes(Mbarrier& b, int bytes) {
  b.bytes += bytes;
  if (b.armed && b.bytes == 0) {
    b.armed = 0;
    ++b.phase;
  }
  progress = true;
}

void init_mbarrier(void* barrier) {
  check_shared(barrier, sizeof(Mbarrier));
  *static_cast<Mbarrier*>(barrier) = {};
}
void arm_mbarrier(void* barrier, int bytes) {
  check_shared(barrier, sizeof(Mbarrier));
  Mbarrier& b = mbarrier_at(barrier);
  if (b.armed && !is_off("cluster")) fail("an mbarrier is armed twice in a phase");
  tsan_release(barrier);
  b.armed = 1;
  count_bytes(b, bytes);
}

// Not by memcpy: the sanitizer has the store where it was issued.
static void arrive_store(const Store& store) {
  for (size_t i = 0; i < kVectorBytes; ++i)
    const_cast<volatile char*>(store.to)[i] = store.bytes[i];
  count_bytes(mbarrier_at(store.barrier), -static_cast<int>(kVectorBytes));
}
void store_async(void* to, const void* bytes, void* barrier) {
  std::vector<Block>& blocks = current->block->cluster->blocks;
  const auto owner = std::find_if(blocks.begin(), blocks.end(), [&](const Block& b) {
    const int64_t at = static_cast<char*>(to) - b.shared;
    return at >= 0 && at < grid.shared_bytes;
  });
  if (owner == blocks.end()) fail("a store to no CTA of the cluster");
  check_shared_of(*owner, to, kVectorBytes);
  check_shared_of(*owner, barrier, sizeof(Mbarrier));
  if (owner->exiting) fail("a store to a CTA that exits");
  mbarrier_at(barrier);
  Store store{static_cast<char*>(to), static_cast<char*>(barrier), {}};
  std::memcpy(store.bytes, bytes, kVectorBytes);
  std::memset(to, 0xff, kVectorBytes);  // poison
  tsan_release(barrier);
  if (random.one_in(2)) return arrive_store(store);
  const AsScheduler scope;
  owner->stores.push_back(store);
}
void wait_mbarrier(void* barrier, int parity) {
  check_shared(barrier, sizeof(Mbarrier));
  if (is_off("cluster")) return;
  const Mbarrier& b = mbarrier_at(barrier);
  std::vector<Store>& stores = current->block->stores;
  while ((b.phase & 1) == parity) {
    {
      // Some of the stores that are under way, in any order.
      const AsScheduler scope;
      random.shuffle(stores);
      const size_t later = random.is_on() ? stores.size() / 2 : 0;
      for (; stores.size() > later; stores.pop_back()) arrive_store(stores.back());
    }
    if ((b.phase & 1) == parity) yield();
  }
  tsan_acquire(barrier);
}

static void read_source(Copy& copy) {
  if (copy.from) {
    on_access(copy.from, kVectorBytes, false);
    std::memcpy(copy.bytes, copy.from, kVectorBytes);
  } else {
    std::memset(copy.bytes, 0, kVectorBytes);
  }
  copy.state = Copy::kRead;
}
static void complete(Copy& copy) {
  if (copy.state == Copy::kLate) read_source(copy);
  if (copy.state == Copy::kRead) std::memcpy(copy.to, copy.bytes, kVectorBytes);
  copy.state = Copy::kDone;
}

void enqueue_copy(void* to, const void* from, bool valid) {
  check_shared(to, kVectorBytes);
  if (reinterpret_cast<uintptr_t>(from) % kVectorBytes != 0) fail("a copy's source is misaligned");
  Copy copy{to, valid ? from : nullptr, Copy::kLate, {}};
  if (random.one_in(2)) read_source(copy);
  if (copy.state == Copy::kRead && random.one_in(2))
    complete(copy);
  else
    std::memset(to, 0xff, kVectorBytes);  // poison
  current->copies.push_back(copy);
}
void commit_copies() {
  current->groups.push_back(current->copies.size());
}
void wait_copies(int pending) {
  if (is_off("copies")) return;
  std::vector<Copy>& copies = current->copies;
  std::vector<size_t>& groups = current->groups;
  const int finished = static_cast<int>(groups.size()) - pending;
  if (finished <= 0) return;
  const size_t end = groups[finished - 1];
  for (size_t i = 0; i < end; ++i) complete(copies[i]);
  copies.erase(copies.begin(), copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + finished);
  for (size_t& group : groups) group -= end;
}

static uint32_t (&store_words(const uint32_t (&own)[8]))[32][8] {
  Warp& warp = own_warp();
  auto& words = warp.words[warp.barrier.generation & 1];
  for (int i = 0; i < 8; ++i) words[current->thread % 32][i] = own[i];
  return words;
}
const LaneWords& exchange_words(const char* instruction, const uint32_t (&own)[8]) {
  LaneWords& words = store_words(own);
  arrive_and_wait(own_warp(), instruction, false);
  return words;
}

}  // namespace lstm_fused::cuda::fibers
