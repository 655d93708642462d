// The arena: one scratch buffer from which a kernel takes its aligned pieces.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lstm_fused {
namespace {

// Pieces begin at multiples of 64 bytes. With a null base the arena only counts what is taken.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace lstm_fused
