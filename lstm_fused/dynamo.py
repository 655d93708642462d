"""Let torch.compile trace lstm_fused.LSTM, GRU and RNN.

Dynamo breaks the graph at every torch.nn.RNNBase, subclasses included, unless its ``allow_rnn`` is
set: then it unrolls them, step by step. Ours is one op a layer and needs the first, but setting
that globally would do the second to torch's own. So it is set only while Dynamo looks at ours.
"""

import importlib.abc
import importlib.machinery
import sys

_BUILDER = "torch._dynamo.variables.builder"


def allow(classes):
    """Have Dynamo accept modules of these classes, once somebody imports it: that takes seconds."""
    if _BUILDER in sys.modules:
        _patch(sys.modules[_BUILDER], classes)
    else:
        sys.meta_path.insert(0, _PatchOnImport(classes))


class _PatchOnImport(importlib.abc.MetaPathFinder):
    def __init__(self, classes):
        self.classes = classes

    def find_spec(self, name, path, target=None):
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        exec_module = spec.loader.exec_module

        def exec_and_patch(module):
            exec_module(module)
            _patch(module, self.classes)

        spec.loader.exec_module = exec_and_patch
        return spec


def _patch(builder, classes):
    wrap_module = builder.VariableBuilder.wrap_module

    def wrap(self, value):
        if not isinstance(value, classes):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap
