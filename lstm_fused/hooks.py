"""Run a function when another module is imported, which may be absent or slow to import.

Our classes and operators are registered with torch.compile's tracer, the ONNX exporter and opacus
only in a program that imports these.
"""

import importlib.abc
import sys


def when_imported(name, function):
    """Call function(module) once the module of this name is imported; now if it already is."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _CallOnImport(name, function))


class _CallOnImport(importlib.abc.MetaPathFinder):
    def __init__(self, name, function):
        self.name, self.function = name, function

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        found = (
            finder.find_spec(name, path, target)
            for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]
            if hasattr(finder, "find_spec")
        )
        spec = next(filter(None, found), None)
        if spec is not None and spec.loader is not None:
            self._call_after(spec.loader)
        return spec

    def _call_after(self, loader):
        exec_module = loader.exec_module

        def exec_and_call(module):
            exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.function(module)

        loader.exec_module = exec_and_call
