"""How a result is judged: tolerances, the float64 oracle, and the comparison with it."""
