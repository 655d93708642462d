"""torch.distributed in a test's own process."""

import ctypes
from contextlib import contextmanager

import torch


@contextmanager
def one_process():
    """A process group of this process alone.

    It is never freed: DistributedDataParallel frees its group while it holds the GIL, and the group
    waits for a thread that may need the GIL to free its last work, which now and then hangs.
    """
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(torch.distributed.group.WORLD))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
