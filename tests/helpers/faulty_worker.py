"""bench.worker with providers that spoil it: what a GPU's would do."""

import os
import time

from bench import providers, worker


def exits(task):
    os._exit(7)


class Hangs(providers.ModuleRun):
    def _forward(self):
        y = super()._forward()
        if self.judged:  # so it hangs under the clock
            time.sleep(1000)
        return y

    judged = False

    def results(self):
        found = super().results()
        self.judged = True
        return found


def refuses(task):
    raise RuntimeError("not captured")


providers.PROVIDERS |= {
    "exits": providers.Provider(exits),
    "hangs": providers.Provider(lambda task: Hangs(providers.copied(task), task)),
    "refuses": providers.Provider(refuses),
}
if __name__ == "__main__":
    worker.sound = lambda device: False  # after any failure, as after one in a capture
    worker.main()
