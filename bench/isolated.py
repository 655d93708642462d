"""Calls of functions in a process of their own, which may hang, die or be left unusable by them."""

import contextlib
import multiprocessing
import os
import signal

import torch

SILENCE = 30.0  # seconds without a message of `trying` after which the process counts as hanging
COMPILING = 900.0  # the same where torch.compile unrolls loops
STARTING = 90.0  # before its first message, in a new process or after a long oracle

_parent = None  # in such a process: the connection to its parent


class Lost(Exception):
    """A call without a result; the message says why, `trying` which provider caused it, or None."""

    def __init__(self, reason: str, trying: str | None):
        super().__init__(reason)
        self.trying = trying


def trying(name: str) -> None:
    """Tells the parent of such a process which provider runs next; nothing in other processes."""
    if _parent:
        _parent.send(("trying", name))


def _serve(connection, threads: int) -> None:
    """Answers calls until the connection ends."""
    global _parent
    os.setsid()  # Ctrl-C reaches the parent, which ends this process
    os.dup2(2, 1)  # what libraries print is no result
    _parent = connection
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError):
        while True:
            function, args, kwargs = connection.recv()
            try:
                answer = ("result", function(*args, **kwargs))
            except Exception as error:
                answer = ("error", f"{type(error).__name__}: {error}".split("\n")[0])
            connection.send(answer)


class Worker:
    """A process that starts with the first call; variables: added to its environment."""

    def __init__(self, variables: dict[str, str] | None = None, silence: float = SILENCE):
        self.variables, self.silence = variables or {}, silence
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def call(self, function, *args, **kwargs):
        """function(*args, **kwargs), picklable as the result is. Lost ends the process."""
        if self.process is None:
            self._start()
        tried, timeout = None, STARTING
        try:
            self.connection.send((function, args, kwargs))
            while self.connection.poll(timeout):
                kind, what = self.connection.recv()
                if kind == "result":
                    return what
                if kind == "error":
                    raise Lost(what, tried)
                tried, timeout = what, self.silence
            raise Lost(f"said nothing for {timeout:.0f} s", tried)
        except (EOFError, OSError):
            self.process.join()
            reason = f"its process ended with exit code {self.process.exitcode}"
            self.stop()
            raise Lost(reason, tried) from None
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        context, before = multiprocessing.get_context("spawn"), dict(os.environ)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        os.environ.update(self.variables)
        try:
            self.process.start()
        finally:
            for name in self.variables:
                del os.environ[name]
            os.environ.update(before)
        theirs.close()

    def stop(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process = None
