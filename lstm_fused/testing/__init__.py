"""What a result is held to: tolerances, and the comparison with a float64 oracle."""
