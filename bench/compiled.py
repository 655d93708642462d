"""Small programs that measure the machine, compiled for it once."""

import hashlib
import os
import subprocess
from pathlib import Path

BUILD = Path(__file__).parent.parent / "build"


class NotMeasured(Exception):
    """Why the machine's limits are not known here, in one line."""


def compiled(source: Path, command: list[str], suffix: str, *facts: str) -> Path:
    """`command` source -o path, unless that was done: with the same command, text and facts."""
    key = hashlib.sha256(repr((source.read_text(), command, facts)).encode()).hexdigest()[:12]
    path = BUILD / f"{source.stem}-{key}{suffix}"
    if path.exists():
        return path
    BUILD.mkdir(exist_ok=True)
    half_made = path.with_suffix(f".{os.getpid()}")
    try:
        subprocess.run(
            [*command, str(source), "-o", str(half_made)],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().split("\n")
        raise NotMeasured(f"{source.name} does not compile: {lines[0]}") from None
    half_made.replace(path)
    return path
