// What kernels need to know of their cell: constants of a cell that is compiled into them, numbers
// of a described one, which is known at run time.
#pragma once

#include "../cells/cells.h"
#include "../cells/unit.h"

namespace lstm_fused {
namespace {

// What a cell carries from step to step: kAny whether that may be anything, how many cell states,
// whether h. A described cell is known at run time.
template <class Cell>
struct CarryOf {
  static constexpr bool kAny = Cell::kCarry != Carry::kNone;
  static constexpr int cells(const UnitInfo*) { return Cell::kCarry == Carry::kCell; }
  static constexpr bool hidden(const UnitInfo*) { return Cell::kCarry == Carry::kHidden; }
};
template <>
struct CarryOf<AnyCell> {
  static constexpr bool kAny = true;
  static int cells(const UnitInfo* unit) { return unit->cells; }
  static bool hidden(const UnitInfo* unit) { return unit->keeps_hidden; }
};

// A cell's numbers of gates and pre-activations.
template <class Cell>
struct GatesOf {
  static constexpr int G = Cell::kGates, P = Cell::kPreacts;
  explicit GatesOf(const UnitInfo*) {}
};
template <>
struct GatesOf<AnyCell> {
  const int G, P;
  explicit GatesOf(const UnitInfo* unit) : G(unit->gates), P(unit->preacts) {}
};

// Both, and a described cell's functions. A is the compute type.
template <class Cell, class A>
struct CellFacts : GatesOf<Cell> {
  using GatesOf<Cell>::G;
  using Carried = CarryOf<Cell>;
  static constexpr bool kCarries = Carried::kAny;
  const UnitInfo* const info;  // of a described cell

  explicit CellFacts(const UnitInfo* unit) : GatesOf<Cell>(unit), info(unit) {}

  // What is carried: the cell states, then h if it is.
  int cells() const { return Carried::cells(info); }
  bool keeps_hidden() const { return Carried::hidden(info); }
  int carried() const { return cells() + keeps_hidden(); }
  // Values of a unit that forward saves of a step beside its gates.
  int saved() const { return carried() + normalized_groups(); }
  int normalized_groups() const { return kIsAny<Cell> ? info->groups : 0; }
  bool normalizes() const { return normalized_groups() > 0; }
  // Whether the last gate multiplies an operand of the cell's own (cells/described.h).
  bool has_operand() const { return kIsAny<Cell> && info->operand; }
  // Whether a step has more to do between its first product and the cell.
  bool finishes_later() const { return normalizes() || has_operand(); }
  // The gates that multiply the hidden state.
  int hidden_gates() const { return G - has_operand(); }
  // Parameters of a unit.
  int vectors_of_unit() const { return kIsAny<Cell> ? info->vectors : 0; }
  const UnitFunctions<A>& unit() const {
    return *static_cast<const UnitFunctions<A>*>(info->functions);
  }
};

}  // namespace
}  // namespace lstm_fused
