// Memory that stays with its thread between calls.
#pragma once

#include <cstring>
#include <new>

#include "../poison.h"
#include "system.h"

namespace lstm_fused {

// Touching new pages costs more than many a kernel. Large pages where the system lends them:
// weights are read in long runs.
class Scratch {
 public:
  ~Scratch() { free_aligned(data_); }

  // Throws std::bad_alloc.
  void* of(size_t bytes) {
    if (bytes > size_) grow(bytes);
    if (poisoning()) std::memset(data_, 0xff, bytes);
    return data_;
  }
  void done() {
    if (size_ > kMaxKept) release();
  }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;
  static constexpr size_t kMaxKept = size_t{64} << 20;

  void grow(size_t bytes) {
    release();
    const size_t unit = bytes >= kHugePage ? kHugePage : 4096;
    const size_t size = (bytes + unit - 1) / unit * unit;
    data_ = allocate_aligned(unit, size, unit == kHugePage);
    if (!data_) throw std::bad_alloc();
    size_ = size;
  }
  void release() {
    free_aligned(data_);
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lstm_fused
