"""Pairwise covering designs: every two values of every two factors meet in some row."""

import random
from itertools import combinations, product

CANDIDATES = 40


def pairs_of(row):
    return set(combinations(row.items(), 2))


def pairwise(factors, seed=0):
    """Rows (dicts) such that each pair of values of two factors is in one; same seed, same rows.

    factors: {name: (value, ...)}. Greedy: each row is the best of a few that start from a pair
    not covered yet.
    """
    rng = random.Random(seed)
    names = list(factors)
    missing = {}  # a dict for its order: sets of strings have none that repeats
    for a, b in combinations(names, 2):
        for va, vb in product(factors[a], factors[b]):
            missing[(a, va), (b, vb)] = None
    rows = []
    while missing:
        (a, va), (b, vb) = next(iter(missing))
        best, best_gain = None, set()
        for _ in range(CANDIDATES):
            row = {name: rng.choice(factors[name]) for name in names} | {a: va, b: vb}
            gain = pairs_of(row) & missing.keys()
            if len(gain) > len(best_gain):
                best, best_gain = row, gain
        for pair in best_gain:
            del missing[pair]
        rows.append(best)
    return rows
