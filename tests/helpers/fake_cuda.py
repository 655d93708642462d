"""A fake torch.cuda on the CPU: events, streams, and graphs that replay operators."""

import contextlib
import time
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class CUDAGraph:
    """Records operator calls; replay repeats them and writes to the recorded output tensors."""

    def __init__(self):
        self.calls = []

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, given in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(as_tuple(given), as_tuple(again), strict=True):
                    if isinstance(new, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def as_tuple(found):
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


class Capture(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


PROPERTIES = SimpleNamespace(
    name="NVIDIA Abacus",
    major=9,
    minor=0,
    multi_processor_count=2,
    total_memory=1 << 30,
    shared_memory_per_multiprocessor=1 << 10,
    regs_per_multiprocessor=1 << 10,
    L2_cache_size=1 << 12,
)


def install(monkeypatch):
    only = Stream()
    for name, fake in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": Capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: only,
        "default_stream": lambda: only,
        "synchronize": lambda: None,
        "get_device_properties": lambda index: PROPERTIES,
        "get_device_capability": lambda: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
