"""Plans and build information: csrc/plan_module."""

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

block: int  # hidden units of a block, csrc/params.h
quantization_group: int  # int8 weights of a row that have one scale

class BuildInfo(TypedDict):
    version: str
    compiler: str
    torch: str  # the version that was built against
    cuda: bool
    isas: tuple[str, ...]

class CellInfo(TypedDict):
    id: int
    gates: int
    preacts: int
    carry: Literal["none", "cell", "hidden"]
    cells: int  # cell states of a unit
    keeps_hidden: bool  # whether h is carried before it is rounded
    vectors: int  # parameters of a unit
    masks: int  # values of a unit for each step
    groups: int  # of values that are normalized over all units of a row
    operand: bool  # whether the last gate multiplies an operand of the cell's own
    described: bool
    input_gates: tuple[int, ...]
    hidden_gates: tuple[int, ...]

class Plan:
    @property
    def kernel(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    threads: int
    direction_groups: int
    row_groups: int
    unit_groups: int
    hoist_steps: int
    undisturbed: int
    nanoseconds: int

class CudaPlan:
    @property
    def kind(self) -> str: ...
    backward: bool
    tf32: bool
    tile_rows: int
    unit_tiles: int
    unit_ctas: int
    row_groups: int
    threads: int
    shared_bytes: int

class Topology:
    cores: int
    cache_cores: int
    socket_cores: int
    l2: int
    l3: int
    mhz: int
    def __init__(
        self,
        cores: int = ...,
        cache_cores: int = ...,
        socket_cores: int = ...,
        l2: int = ...,
        l3: int = ...,
        mhz: int = ...,
    ) -> None: ...

class LoadEstimate:
    def undisturbed(self, threads: int, now: int) -> int: ...
    def tries(self, threads: int, now: int) -> bool: ...
    def put_off(self, now: int) -> None: ...
    def note(self, threads: int, taken: int, longest: int, late: int, now: int) -> None: ...

def plan(
    dtype: str,
    isa: str,
    threads: int,
    T: int,
    N: int,
    I: int,  # noqa: E741
    H: int,
    R: int,
    directions: int = 1,
    projection: bool = False,
    training: bool = False,
    backward: bool = False,
    cell: str = "lstm",
    undisturbed: int = 0,
    topology: Topology = ...,
    weights: str = "plain",
) -> Plan: ...
def run_of(numbers: Sequence[int]) -> dict[str, Any]: ...
def cells() -> dict[str, CellInfo]: ...
def register_cell(
    name: str,
    gates: int,
    preacts: int,
    cells: int,
    keeps_hidden: bool,
    vectors: int,
    masks: int,
    groups: int,
    operand: bool,
) -> int: ...
def saved_layouts() -> dict[str, dict[str, tuple[str, ...]]]: ...
def build_info() -> BuildInfo: ...
def read_topology(root: str, cpus: Sequence[int]) -> Topology: ...
def idle_cpus(root: str) -> int: ...
def cuda_plan(
    dtype: str,
    T: int,
    N: int,
    H: int,
    R: int,
    directions: int,
    gates: int,
    projection: bool,
    tf32: bool,
    device: Sequence[int],
    backward: bool = False,
    kind: str = "",
    described: bool = False,
    normalizes: bool = False,
) -> CudaPlan | None: ...
def cuda_cudnn_reason(
    dtype: str,
    T: int,
    N: int,
    H: int,
    R: int,
    directions: int,
    gates: int,
    projection: bool,
    tf32: bool,
    device: Sequence[int],
    backward: bool = False,
    kind: str = "",
    described: bool = False,
    normalizes: bool = False,
) -> str | None: ...
def cuda_run_of(numbers: Sequence[int]) -> dict[str, Any]: ...
def cuda_kinds() -> tuple[str, ...]: ...
def cuda_architectures() -> tuple[tuple[str, str, tuple[int, ...]], ...]: ...
def cuda_row_bytes(dtype: str, values: int) -> int: ...
