// What the library of a user's cell exports. lstm_fused.compile_cell makes a source file for each
// ISA that includes this header after that of the cell; LSTM_FUSED_USER_CELL is the cell.
#pragma once

#include <concepts>

#include "../params.h"
#include "derive.h"

namespace lstm_fused {
namespace {

using UserCell = LSTM_FUSED_USER_CELL;

template <class Cell>
concept HasGates = requires {
  { Cell::kGates } -> std::convertible_to<int>;
};
template <class Cell>
concept HasPreacts = requires {
  { Cell::kPreacts } -> std::convertible_to<int>;
};
template <class Cell>
concept HasForward = requires(const Traced* in, Traced* next) {
  { Cell::template forward<Traced>(in, in, in, in, next) } -> std::convertible_to<Traced>;
};
// A function of that name with other arguments would be left out without a word.
template <class Cell>
concept HasOtherOperand = requires { &Cell::template operand<Traced>; } && !HasOperand<Cell>;
static_assert(HasGates<UserCell>, "the cell has no `static constexpr int kGates`");
static_assert(HasPreacts<UserCell>, "the cell has no `static constexpr int kPreacts`");
static_assert(HasForward<UserCell>,
              "the cell has no `template <class V> static constexpr V forward(const V* preact, "
              "const V* vector, const V* mask, const V* prev, V* next)`");

static_assert(!HasOtherOperand<UserCell>,
              "the cell's operand is not `template <class V> static constexpr V operand(const V* "
              "preact, const V* vector, const V* mask, const V* prev)`");

static_assert(kMaxUnitValues == 16);  // as the message says
static_assert(UserCell::kVectors <= kMaxUnitValues && UserCell::kMasks <= kMaxUnitValues,
              "the cell's kVectors and kMasks must be 16 at most");

using UserDerivation = Derivation<UserCell>;
inline constexpr const UserDerivation& kUserDerivation = kDerivation<UserCell>;

template <class Cell>
void write_trace(int64_t* numbers, int64_t* steps, double* constants, int64_t* next) {
  static constexpr Derivation<Cell> derivation;
  numbers[0] = derivation.trace.count;
  numbers[1] = derivation.h;
  if (!steps) return;
  for (int i = 0; i < derivation.trace.count; ++i) {
    const TraceStep& step = derivation.trace.steps[i];
    *steps++ = static_cast<int64_t>(step.operation);
    *steps++ = step.group;
    *steps++ = step.count;
    for (int operand : step.operands) *steps++ = operand;
    constants[i] = step.constant;
  }
  for (int k = 0; k < UserDerivation::kStates; ++k) next[k] = derivation.next[k];
}

}  // namespace
}  // namespace lstm_fused

extern "C" {

// facts (9,)
void lstm_fused_cell_facts(int64_t* facts) {
  using namespace lstm_fused;
  const int64_t all[] = {UserCell::kGates,
                         UserCell::kPreacts,
                         UserCell::kCells,
                         UserCell::kKeepsHidden,
                         UserCell::kVectors,
                         UserCell::kMasks,
                         kUserDerivation.trace.groups,
                         HasOperand<UserCell>,
                         TraceStep::kMaxOperands};
  std::memcpy(facts, all, sizeof(all));
}

// Of forward, or of operand: numbers (2,), how many steps there are and which of them is the
// result; and if steps is not null, steps (count, 3 + kMaxOperands): operation, group, number of
// operands, operands; constants (count,); next (kCells + kKeepsHidden,).
void lstm_fused_cell_trace(int operand, int64_t* numbers, int64_t* steps, double* constants,
                           int64_t* next) {
  using namespace lstm_fused;
  if constexpr (HasOperand<UserCell>)
    if (operand) return write_trace<OperandOf<UserCell>>(numbers, steps, constants, next);
  write_trace<UserCell>(numbers, steps, constants, next);
}

// functions (2,): the addresses of UnitFunctions of float and of double.
void lstm_fused_cell_functions(const void** functions) {
  using namespace lstm_fused;
  static constexpr UnitFunctions<float> of_float = unit_functions<UserCell, VFloat, float>();
  static constexpr UnitFunctions<double> of_double = unit_functions<UserCell, VDouble, double>();
  functions[0] = &of_float;
  functions[1] = &of_double;
}
}
