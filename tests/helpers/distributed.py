"""torch.distributed in a test's own process."""

from contextlib import contextmanager

import torch


@contextmanager
def one_process():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
