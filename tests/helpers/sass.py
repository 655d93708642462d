"""What the machine code of the CUDA kernels has in the loop over the time steps.

    python -m tests.helpers.sass CUBIN [PART OF A KERNEL'S NAME]
    python -m tests.helpers.sass --write

The second form compiles the kernels and writes what they have into sass_limits.json, which
tests/cuda/test_cuda_build.py holds them to. Needs cuobjdump and nvdisasm: of the CUDA toolkit, or
of the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

LIMITS = Path(__file__).with_name("sass_limits.json")
LIMITED = ("instructions", "membars", "divisions", "consumed_loads")
PLANS = ("step", "grid", "cluster")
NAME = re.compile(
    r"17recurrence_kernelI.*?(?P<math>Float16|BFloat16|Tf32|FusedMultiplyAddI[fd])"
    r".*?(?P<epilogue>Forward|Backward)CellI.*?\d(?P<cell>Lstm|Gru|RnnTanh|RnnRelu)E"
    r".*ELi(?P<rows>\d)ELNS0_8PlanKindE(?P<plan>\d)ELi(?P<tiles>\d)E"
)
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")

# Instructions by what they do for the exchange between two time steps.
ARRIVES = re.compile(r"UCGABAR_ARV|STAS|RED.*\.STRONG\.GPU|ATOMG.*\.STRONG\.GPU")
# A CTA's barrier ends the time between arrive and wait too: there is none in between.
WAITS = re.compile(r"UCGABAR_WAIT|SYNCS\.PHASECHK|LDG?\.\S*STRONG\.GPU|BAR\.SYNC")
STORES = re.compile(r"ST|RED|ATOM|UBLKCP|LDGSTS")  # their first operand is no destination
GLOBAL_LOADS = re.compile(r"LDG?\.E(?!.*STRONG)")


def find_cuobjdump():
    """The program's path, or None."""
    if found := shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump"):
        return found
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "cuobjdump"), None)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def target(self):
        """Where a branch goes, or None."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        return int(found[1], 16) if self.opcode.startswith("BRA") and found else None

    @property
    def is_conditional(self):
        return bool(self.predicate) or re.match(r"!?U?P\d", self.operands) is not None

    @cache  # noqa: B019 (the instructions of a file are few)
    def registers(self):
        """(read, written) register numbers; of a wide operand that is read its first one."""
        operands = [part.strip() for part in self.operands.split(",")]
        written = set()
        first = re.match(r"R(\d+)\b", operands[0])
        if first and not STORES.match(self.opcode):
            width = 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1
            written = {int(first[1]) + i for i in range(width)}
            operands = operands[1:]
        return {int(r) for part in operands for r in re.findall(r"\bR(\d+)\b", part)}, written


@dataclass(frozen=True)
class StepLoop:
    """Numbers of a kernel's loop over the time steps, whichever path a step takes through it."""

    instructions: int
    membars: int
    invalidations: int  # of L1
    divisions: int  # of integers by a divisor that is no constant
    consumed_loads: int  # of global memory, used between arrive and wait
    predicated: int  # ldmatrix and mma
    products: int  # mma
    local: int  # accesses of spilled registers, in the whole kernel
    registers: int  # of a thread, in the whole kernel


def kernel_name(mangled):
    """Such as "forward cluster Lstm Float16 8x3": rows of a tile, unit tiles of a CTA; or None."""
    found = NAME.search(mangled)
    if found is None:
        return None
    math = {"FusedMultiplyAddIf": "Float32", "FusedMultiplyAddId": "Float64"}.get(
        found["math"], found["math"]
    )
    plan = PLANS[int(found["plan"])]
    size = f"{8 * int(found['rows'])}x{found['tiles']}"
    return f"{found['epilogue'].lower()} {plan} {found['cell']} {math} {size}"


def dump(what, file, arch):
    """What cuobjdump prints of a file, or of its code for one architecture."""
    program = find_cuobjdump()
    # It looks for nvdisasm in the path, which pip puts beside it.
    env = os.environ | {"PATH": f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [program, what, *(("-arch", f"sm_{arch}") if arch else ()), str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout


def disassemble(file, arch=None):
    """{kernel's name: (instructions, registers)} of the recurrence's kernels in a file."""
    usage = dump("-res-usage", file, arch)
    registers = dict(re.findall(r"Function (\S+?):\s+REG:(\d+)", usage))
    text = dump("-sass", file, arch)
    kernels = {}
    for part in re.split(r"\n\s+Function : ", text)[1:]:
        mangled, _, body = part.partition("\n")
        if name := kernel_name(mangled):
            found = map(INSTRUCTION.match, body.splitlines())
            code = [
                Instruction(int(m[1], 16), (m[2] or "").strip(), m[3], m[4].strip())
                for m in found
                if m
            ]
            kernels[name] = (code, int(registers.get(mangled, 0)))
    return kernels


def successors(code):
    """The indices of the instructions that may run after each."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    after = []
    for i, instruction in enumerate(code):
        follows = [i + 1] if i + 1 < len(code) else []
        ends = instruction.opcode.startswith(("EXIT", "BRA", "RET", "BRX"))
        if ends and not instruction.is_conditional:
            follows = []
        if instruction.target in index:
            follows.append(index[instruction.target])
        after.append(follows)
    return after


def step_loop(after):
    """The indices of the largest set of instructions that can all reach each other, sorted."""
    order, low, on_stack, stack, largest, count = {}, {}, set(), [], [], 0
    for root in range(len(after)):  # Tarjan's strongly connected components, without recursion
        if root in order:
            continue
        work = [(root, iter(after[root]))]
        order[root] = low[root] = count = count + 1
        stack.append(root)
        on_stack.add(root)
        while work:
            at, rest = work[-1]
            for to in rest:
                if to not in order:
                    order[to] = low[to] = count = count + 1
                    stack.append(to)
                    on_stack.add(to)
                    work.append((to, iter(after[to])))
                    break
                if to in on_stack:
                    low[at] = min(low[at], order[to])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[at])
                if low[at] == order[at]:
                    split = stack.index(at)
                    component, stack = stack[split:], stack[:split]
                    on_stack.difference_update(component)
                    if len(component) > len(largest):
                        largest = component
    return sorted(largest)


def reachable(after, starts, stops):
    """What runs after `starts`, up to the instructions for which stops(index) is true."""
    seen, work = set(), [to for start in starts for to in after[start]]
    while work:
        at = work.pop()
        if at in seen or stops(at):
            continue
        seen.add(at)
        work.extend(after[at])
    return seen


def consumed_loads(code, after, loop):
    """The indices of loads between arrive and wait whose result is used before the wait: they make
    a warp wait for memory there."""
    inside = set(loop)

    def waits(at):
        # One under a predicate may be of another path: of a CTA with several tiles of rows.
        barrier = WAITS.match(code[at].opcode) is not None and not code[at].predicate
        return at not in inside or barrier

    arrivals = [i for i in loop if ARRIVES.match(code[i].opcode)]
    between = reachable(after, arrivals, waits)
    found = []
    for at in sorted(between):
        if not GLOBAL_LOADS.match(code[at].opcode):
            continue
        _, loaded = code[at].registers()
        seen, work = set(), [(to, frozenset(loaded)) for to in after[at]]
        while work:
            to, live = work.pop()
            if (to, live) in seen or to not in between:
                continue
            seen.add((to, live))
            read, written = code[to].registers()
            if read & live:
                found.append(at)
                break
            if live - written:
                work.extend((then, live - written) for then in after[to])
    return found


def measure(code, registers):
    """The StepLoop of a kernel."""
    after = successors(code)
    loop = step_loop(after)
    inside = [code[i] for i in loop]

    def count(pattern, instructions=inside):
        return sum(re.match(pattern, i.opcode) is not None for i in instructions)

    return StepLoop(
        instructions=len(inside),
        membars=count("MEMBAR"),
        invalidations=count(r"CCTL\.IVALL"),
        divisions=count(r"I2F\S*\.RP"),
        consumed_loads=len(consumed_loads(code, after, loop)),
        predicated=sum(bool(i.predicate) for i in inside if i.opcode.startswith(("LDSM", "HMMA"))),
        products=count("HMMA"),
        local=count(r"LDL|STL", code),
        registers=registers,
    )


def persistent_plans(arch):
    """Where there are no clusters, their kernels are compiled without a body."""
    return ("grid",) if arch.startswith("8") else ("grid", "cluster")


def largest_numbers(file, arch):
    """{kernel: [the largest of each number in LIMITED]} of a file's persistent kernels. Those of
    all sizes of tiles are one."""
    largest = {}
    for name, (code, registers) in disassemble(file, arch).items():
        kernel = f"{arch} {name.rpartition(' ')[0]}"
        if kernel.split()[2] not in persistent_plans(arch):
            continue
        loop = measure(code, registers)
        found = [getattr(loop, number) for number in LIMITED]
        largest[kernel] = [*map(max, found, largest.get(kernel, found))]
    return largest


def write_limits():
    from tests.helpers import cubins

    kernels = {}
    with tempfile.TemporaryDirectory() as folder:
        for source, arch in cubins.pairs(cubins.PERSISTENT):
            code, said, file = cubins.machine_code(source, arch, Path(folder))
            assert code == 0, said
            kernels |= largest_numbers(file, arch)
    rows = ",\n".join(f'"{name}": {numbers}' for name, numbers in sorted(kernels.items()))
    head = f'"nvcc": "{cubins.nvcc_release()}",\n"numbers": {json.dumps(LIMITED)}'
    LIMITS.write_text(f'{{\n{head},\n"kernels": {{\n{rows}\n}}\n}}\n')


def main(cubin, part=""):
    for name, (code, registers) in disassemble(Path(cubin)).items():
        if part in name:
            numbers = asdict(measure(code, registers))
            print(f"{name:38}", *(f"{key} {value}" for key, value in numbers.items()))


if __name__ == "__main__":
    write_limits() if sys.argv[1:] == ["--write"] else main(*sys.argv[1:])
