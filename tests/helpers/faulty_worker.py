"""bench.measure with providers that break their process, as a GPU's would."""

import os
import time

from bench import measure, providers
from bench.runs import ModuleRun


def exits(case):
    os._exit(7)


class Hangs(ModuleRun):
    """Hangs under the clock, after the gate."""

    def results(self):
        found = super().results()
        self.step = lambda: time.sleep(1000)
        return found


def refuses(case):
    raise RuntimeError("not captured")


FAULTY = {"exits": exits, "hangs": lambda case: Hangs(case.copied(), case), "refuses": refuses}


def measure_row(*args):
    """measure.measure_row in a process that no failure leaves usable."""
    providers.PROVIDERS |= {name: providers.Provider(build) for name, build in FAULTY.items()}
    measure.is_usable = lambda device: False
    return measure.measure_row(*args)
