"""What a result is held to: tolerances, and the float64 oracle and the comparison with it."""
