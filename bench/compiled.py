"""The harness's own C++ and CUDA, compiled when it is first needed."""

import hashlib
import os
import subprocess
from pathlib import Path

from bench import environment

BUILD = environment.ROOT / "build"


class NotMeasured(Exception):
    """Why something is not measured on this machine, in one line."""


def compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def compiled(source: Path, command: list[str], *facts: str) -> Path:
    """The library of `command` source -o path, built unless that was done with the same command,
    text and facts."""
    key = hashlib.sha256(repr((source.read_text(), command, facts)).encode()).hexdigest()[:12]
    path = BUILD / f"{source.stem}-{key}.so"
    if not path.exists():
        BUILD.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        arguments = [*command, str(source), "-o", str(partial)]
        try:
            subprocess.run(arguments, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().split("\n")
            raise NotMeasured(f"{source.name} does not compile: {lines[0]}") from None
        partial.replace(path)
    return path
