"""The emulation of CUDA reports what a GPU would not forgive: faults planted in small kernels."""

import os
import subprocess

import pytest

from tests.helpers import emulated

MEMORY = "an access outside of memory: CTA"
SHARED = "an access outside of shared memory: CTA"
MISALIGNED = "a misaligned access to shared memory: CTA"
UNSEEN = "a read of what another CTA wrote, before it is released and acquired: CTA"
FAULTS = {  # of emulation/faults.cpp, and what is said of each
    "write after shared memory": MEMORY,
    "write just after shared memory": "a write after memory ends",
    "write before shared memory": "a write before memory begins",
    "read after a tensor": MEMORY,
    "write before a tensor": "a write before memory begins",
    "misaligned load": "a misaligned access or undefined arithmetic: CTA",
    "misaligned copy": MISALIGNED,
    "misaligned source of a copy": "a copy's source is misaligned: CTA",
    "copy to after shared memory": SHARED,
    "copy from after a tensor": MEMORY,
    "read before a copy has arrived": "not what is copied: CTA",
    "write before a copy has read": "not what is copied: CTA",
    "missing barrier of a CTA": "not what another thread has copied: CTA",
    "copy pending at exit": "a copy is pending at exit: CTA",
    "different instructions": "the lanes of a warp are at different instructions: CTA",
    "lane that skips an instruction": "deadlock",
    "misaligned ldmatrix": MISALIGNED,
    "ldmatrix after shared memory": SHARED,
    "wait without arrive": "a thread waits for a barrier that it has not arrived at: CTA",
    "two arrivals": "a thread arrives twice at the cluster's barrier: CTA",
    "exit between arrive and wait": "a thread exits between arrive and wait: CTA",
    "misaligned store to another CTA": MISALIGNED,
    "store to no CTA": "a store to no CTA of the cluster: CTA",
    "store to a CTA that exits": "a store to a CTA that exits: CTA",
    "store that is not waited for": "not what was stored: CTA",
    "mbarrier that is not initialized": "an mbarrier that is not initialized: CTA",
    "mbarrier that is armed twice": "an mbarrier is armed twice in a phase: CTA",
    "more bytes armed than stored": "deadlock",
    "unordered writes": "a write over what another CTA wrote, unordered: CTA",
    "read before the release": UNSEEN,
    "read without acquire": UNSEEN,
}
SEEDS = (0, 1, 2)  # 0: in order, and as late as may be


def said_of(fault, seed):
    """(whether the emulation reports the fault, what it says)."""
    emulated.ninja("faults")
    env = os.environ | {"LSTM_FUSED_EMULATION_SEED": str(seed)}
    command = [str(emulated.FOLDER / "faults"), fault]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode == 1, done.stdout


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_reported(fault):
    for seed in SEEDS:
        reported, said = said_of(fault, seed)
        assert reported and said.startswith(FAULTS[fault]), (seed, said)


def test_nothing_is_reported_without_a_fault():
    for seed in range(20):
        assert said_of("none", seed) == (False, "no error\n")
