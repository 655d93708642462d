"""Pairwise covering: every two values of every two factors are together in some row.

`pairwise` designs rows from factors. `covering` selects cases from a list, and `mark_full` keeps
such a selection of a test's cases in `make test`; `make test-full` runs the others, or a spread of
them where they are hundreds, and `python -m pytest -m "" --every-case` all of them.
"""

import inspect
import random
from itertools import combinations, product

import pytest

CANDIDATES = 40
MOST = 60


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


def covering(goals):
    """Indices of some cases, such that each goal that a case reaches is reached by one of those.

    goals: for each case a set. Greedy, in passes: a pass takes, in order, each case that adds at
    least so many goals, first as many as any case has, at last one.
    """
    reached, taken = set(), []
    threshold = max(map(len, goals), default=0)
    while threshold:
        for index, found in enumerate(goals):
            if len(found - reached) >= threshold:
                reached |= found
                taken.append(index)
        threshold = threshold * 2 // 3
    return sorted(taken)


def mark_full(items, every_case=False):
    """Mark `full` the collected tests that no covering needs, of those functions that are
    marked `covering(goals=...)`. MOST of the others are kept, spread evenly, or every case.

    goals: a function of the test's parameters that gives the set of what the test reaches; without
    it, each pair of two parameters' values.
    """
    dropped = set()
    functions = {}
    for item in items:
        if item.get_closest_marker("covering"):
            functions.setdefault((item.path, item.originalname), []).append(item)
    for tests in functions.values():
        needed = set(covering([goals_of(test) for test in tests]))
        others = [test for index, test in enumerate(tests) if index not in needed]
        count = len(others) if every_case else min(MOST, len(others))
        kept = {k * len(others) // count for k in range(count)}
        for k, test in enumerate(others):
            test.add_marker(pytest.mark.full)
            if k not in kept:
                dropped.add(test)
    items[:] = [item for item in items if item not in dropped]


def goals_of(item):
    goals = item.get_closest_marker("covering").kwargs.get("goals")
    params = item.callspec.params
    if not goals:
        return pairs_of({name: str(value) for name, value in params.items()})
    return goals(**{name: params[name] for name in inspect.signature(goals).parameters})
