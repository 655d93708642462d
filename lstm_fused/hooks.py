"""Run a function when another module is imported: for what is too slow to import, or may be absent.

torch.compile's tracer, the ONNX exporter and opacus are told of our classes and operators only
where somebody uses them.
"""

import importlib.abc
import importlib.machinery
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
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_call(module):
            exec_module(module)
            self.function(module)

        spec.loader.exec_module = exec_and_call
        return spec
