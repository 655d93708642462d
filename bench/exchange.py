"""How long CTAs take to meet and to exchange data: `python -m bench.exchange [--json FILE]`.

Builds and runs exchange.cu, for which it needs nvcc and a GPU; `seconds` reads its answer.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench.compiled import NotMeasured, compiled

SOURCE = Path(__file__).with_suffix(".cu")
CSRC = Path(__file__).parent.parent / "csrc"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}"]
HEADERS = (SOURCE.with_suffix(".h"), *sorted((CSRC / "cuda").rglob("*.h")))
LONGEST = 20  # seconds; it takes two


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def program(capability: tuple[int, int]) -> Path:
    """exchange.cu for a GPU of this compute capability."""
    if nvcc() is None:
        raise NotMeasured("nvcc is not installed")
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability[0] == 9 else "")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    headers = (header.read_text() for header in HEADERS)
    return compiled(SOURCE, [nvcc(), *FLAGS, target], "", *headers)


def measure() -> dict:
    """What exchange.cu prints; NotMeasured says why there is nothing."""
    command = [str(program(torch.cuda.get_device_capability()))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"exchange.cu hangs: not done after {LONGEST} s") from None
    if done.returncode:
        raise NotMeasured(f"exchange.cu: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    found = json.loads(done.stdout)
    if found["wrong"]:
        raise NotMeasured(f"exchange.cu read {found['wrong']} words that were not of their step")
    return found


def on_lines(points: dict[float, float], x: float) -> float:
    """The value at x on the lines through the points, the outermost of which go on."""
    xs = sorted(points)
    if len(xs) == 1:
        return points[xs[0]]
    after = next((i for i, at in enumerate(xs[1:], 1) if x <= at), len(xs) - 1)
    a, b = xs[after - 1], xs[after]
    return points[a] + (points[b] - points[a]) * (x - a) / (b - a)


def seconds(found: dict, what: str, ctas: int = 0, size: float = 0) -> float:
    """What `ctas` of a "grid" take to meet and read `size` bytes each, those of a "cluster" to send
    each other `size` bytes; or from one launch to the next, "launch" or, in a "graph"."""
    alone = [m for m in found["measured"] if m["what"] == what and m["groups"] == 1]
    if not alone:
        raise NotMeasured(f"exchange.cu measured no {what} on this device")
    by_ctas: dict[int, dict[float, float]] = {}
    for m in alone:
        by_ctas.setdefault(m["ctas"], {})[m["bytes"]] = m["ns"]
    at_size = {n: on_lines(by_bytes, size) for n, by_bytes in by_ctas.items()}
    return max(0.0, on_lines(at_size, ctas)) * 1e-9


def best(several: list[dict]) -> dict:
    """The least of each number, of several measurements of one device."""
    same = zip(*(found["measured"] for found in several), strict=True)
    return several[0] | {"measured": [min(each, key=lambda m: m["ns"]) for each in same]}


def lines(found: dict) -> list[str]:
    """For people, one each."""

    def words(m):
        groups = f"{m['groups']} x " * (m["groups"] > 1)
        apart = f", counters {8 * m['apart']} bytes apart" * (m["groups"] > 1)
        return f"{m['what']}, {groups}{m['ctas']} CTAs, {m['bytes']} bytes{apart}: {m['ns']:.0f} ns"

    return [words(m) for m in found["measured"]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.exchange", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch finds no CUDA device here", file=sys.stderr)
        return 2
    try:
        found = measure()
    except NotMeasured as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(found)))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
