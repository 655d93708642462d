"""Times every CUDA plan on some shapes beside nn.LSTM: `python -m bench.plans [--json FILE]`.

For choosing between plans and their tilings; no parity is checked here and no table made of it.
"""

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path

import torch

import lstm_fused
from lstm_fused import cuda

# Whether TF32 is allowed goes by the dtype's name.
FIELDS = ("name", "T", "N", "I", "H", "directions", "dtype")
SHAPES = (
    ("FlashRNN", 1024, 16, 768, 768, 1, "float16"),
    ("FlashRNN", 1024, 16, 768, 768, 1, "bfloat16"),
    ("FlashRNN", 1024, 16, 768, 768, 1, "tf32"),
    ("DeepSpeech 2", 300, 20, 800, 800, 1, "tf32"),
    ("small", 150, 16, 256, 256, 1, "bfloat16"),
    ("small", 150, 64, 256, 256, 2, "bfloat16"),
    ("small", 150, 64, 256, 256, 1, "float32"),
    ("middle", 100, 32, 512, 512, 1, "bfloat16"),
    ("middle", 100, 128, 512, 512, 2, "bfloat16"),
    ("large", 50, 64, 1024, 1024, 1, "bfloat16"),
    ("large", 25, 64, 2048, 2048, 1, "bfloat16"),
    ("batch", 32, 4096, 256, 256, 1, "bfloat16"),
)
SAMPLES = 15


def median_ms(step):
    """Median of device times, with a warm-up before."""
    for _ in range(3):
        step()
    times = []
    for _ in range(SAMPLES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def steps_of(module, x):
    """A forward pass without gradients, and one with its backward pass."""

    def forward():
        with torch.no_grad():
            module(x)

    def training():
        module.zero_grad()
        module(x)[0].sum().backward()

    return {"forward": forward, "training": training}


def measure(shape):
    """Milliseconds for each way and plan; a plan the device has no room for is left out."""
    name, T, N, I, H, directions, kind = shape  # noqa: E741
    torch.backends.cudnn.allow_tf32 = kind == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    options = {"bidirectional": directions == 2, "device": "cuda", "dtype": dtype}
    x = torch.randn(T, N, I, device="cuda", dtype=dtype, requires_grad=True)
    theirs = torch.nn.LSTM(I, H, **options)
    ours = lstm_fused.LSTM(I, H, **options)
    times = {way: {"nn.LSTM": median_ms(step)} for way, step in steps_of(theirs, x).items()}
    for plan in (None, *cuda.KINDS):
        cuda.set_plan(plan)
        for way, step in steps_of(ours, x).items():
            step()
            ran = cuda.last_run()["kernel"]
            if plan in (None, ran):
                times[way][plan or f"best: {ran}"] = median_ms(step)
    cuda.set_plan(None)
    return {
        "shape": dict(zip(FIELDS, shape, strict=True)),
        "ms": times,
    }


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.plans", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch finds no CUDA device here", file=sys.stderr)
        return 2
    warnings.filterwarnings("error", message="lstm_fused.LSTM ran through torch")
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape))
        print(" ".join(map(str, shape)))
        for way, times in rows[-1]["ms"].items():
            each = ", ".join(
                f"{who} {ms:.3f} ms ({1000 * ms / shape[1]:.2f} us a step)"
                for who, ms in times.items()
            )
            print(f"  {way}: {each}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
