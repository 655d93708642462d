"""Let torch.compile trace lstm_fused.LSTM, GRU and RNN.

Dynamo breaks the graph at every torch.nn.RNNBase, subclasses included, unless its ``allow_rnn`` is
set: then it unrolls them, step by step. Ours is one op a layer and needs the first, but setting
that globally would do the second to torch's own. So it is set only while Dynamo looks at ours.
"""

import sys
from functools import cache, partial, wraps

from lstm_fused.hooks import when_imported


def untraced(run):
    """run, an operator's kernel in Python, whose frames Dynamo leaves alone.

    Behind a break of the graph, calls run eagerly and Dynamo tries to compile every function that
    they reach. It takes long to trace kernels and rules, and some of what they do it cannot.
    """

    @cache
    def disabled():
        return sys.modules["torch._dynamo"].disable(run)

    @wraps(run)
    def call(*args):
        return (disabled() if "torch._dynamo" in sys.modules else run)(*args)

    return call


def allow(classes):
    """Have Dynamo accept modules of these classes, once it is imported, which takes seconds."""
    when_imported("torch._dynamo.variables.builder", partial(_patch, classes))


def _patch(classes, builder):
    wrap_module = builder.VariableBuilder.wrap_module

    def wrap(self, value):
        if not isinstance(value, classes):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap
