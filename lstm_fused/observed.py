"""Whether somebody observes a call as it runs: a graph is captured, or a transform is on."""

import torch
from torch.autograd import forward_ad


def is_captured():
    """Whether a graph is being captured, so that no tensor's values may be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed():
    """Whether a transform of torch.func or forward-mode differentiation is on."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )
