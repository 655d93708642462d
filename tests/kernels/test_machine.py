"""What a plan knows of the machine: its topology, and what other programs leave of it."""

from itertools import product

import pytest
import torch

import lstm_fused
from lstm_fused import _plan, runtime
from tests.helpers.oracle import CELLS, Problem, run_module
from tests.helpers.plan_coverage import DTYPES, FLOAT_ISAS

MS = 1_000_000  # nanoseconds


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def cpu_files(cpu, siblings, socket, cache, l2="1024K", l3="32M"):
    """The files of one CPU; cache: the CPUs that share its last-level cache."""
    base = f"sys/devices/system/cpu/cpu{cpu}"
    files = {
        f"{base}/topology/thread_siblings_list": siblings,
        f"{base}/topology/physical_package_id": socket,
        f"{base}/cpufreq/cpuinfo_max_freq": 3500000,
    }
    caches = (1, "Data", "32K", siblings), (2, "Unified", l2, siblings), (3, "Unified", l3, cache)
    for k, (level, kind, size, shared) in enumerate(caches):
        at = f"{base}/cache/index{k}"
        files |= {f"{at}/level": level, f"{at}/type": kind, f"{at}/size": size}
        files[f"{at}/shared_cpu_list"] = shared
    return files


def fields(topology):
    return {k: getattr(topology, k) for k in dir(topology) if not k.startswith("_")}


def test_topology_of_cores_with_siblings(tmp_path):
    """Two sockets of four cores, two to a cache, two CPUs to a core, of which 0 to 3 are the
    first socket's cores and 8 to 11 their siblings."""
    for cpu in range(16):
        core = cpu % 8
        pair = core // 2 * 2
        cache = f"{pair}-{pair + 1},{pair + 8}-{pair + 9}"
        write(tmp_path, cpu_files(cpu, f"{core},{core + 8}", core // 4, cache))
    found = fields(_plan.read_topology(str(tmp_path), list(range(16))))
    assert found == {
        "cores": 8,
        "cache_cores": 2,
        "socket_cores": 4,
        "l2": 1 << 20,
        "l3": 32 << 20,
        "mhz": 3500,
    }
    few = _plan.read_topology(str(tmp_path), [1, 9, 4])
    assert (few.cores, few.cache_cores, few.socket_cores) == (2, 1, 1)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, 4),
        (
            {"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"},
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n2:memory:/a",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": 200000,
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": 100000,
            },
            2,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1}, 4),
    ],
)
def test_quota_limits_cores(files, cores, tmp_path):
    for cpu in range(4):
        write(tmp_path, cpu_files(cpu, cpu, 0, "0-3"))
    write(tmp_path, files)
    assert _plan.read_topology(str(tmp_path), [0, 1, 2, 3]).cores == cores


def test_topology_without_files(tmp_path):
    guess = fields(_plan.Topology())
    assert fields(_plan.read_topology(str(tmp_path), [])) == guess
    found = fields(_plan.read_topology(str(tmp_path), [0, 1, 2]))
    assert found == guess | {"cores": 3, "socket_cores": 3}


def test_topology_of_an_arm64_board(tmp_path):
    """Four cores share the last cache, of the second level, and no file names a frequency."""
    for cpu in range(4):
        files = cpu_files(cpu, cpu, 0, "0-3", l2="1024K")
        gone = [name for name in files if "cpufreq" in name or "index2" in name]
        for name in gone:
            del files[name]
        files[f"sys/devices/system/cpu/cpu{cpu}/cache/index1/shared_cpu_list"] = "0-3"
        write(tmp_path, files)
    found = _plan.read_topology(str(tmp_path), [0, 1, 2, 3])
    assert (found.cores, found.cache_cores) == (4, 4)
    assert (found.l2, found.l3) == (256 << 10, 1 << 20)
    assert found.mhz == _plan.Topology().mhz


def plan(threads, N, H, T=100, D=1, backward=False, dtype="float32", **machine):
    sizes = (T, N, H, H, H, D)
    return _plan.plan(dtype, "avx512", threads, *sizes, backward=backward, **machine)


def machine(cores, cache_cores=8, socket_cores=64, **more):
    return {"topology": _plan.Topology(cores, cache_cores, socket_cores, **more)}


MACHINES = {
    "2 cores": (2, machine(2, 2, 2)),
    "8 cores": (8, machine(8, 8, 8)),
    "8 cores with siblings": (16, machine(8, 8, 8)),
    "a quota of 3 of 16 cores": (16, machine(3, 8, 16)),
    "16 cores, 4 to a cache": (16, machine(16, 4, 16)),
    "64 cores": (64, machine(64, 8, 64)),
    "2 sockets of 32 cores": (64, machine(64, 8, 32)),
    "nothing known": (64, {}),
}
SIZES = [
    (N, H, T, D)
    for N in (1, 8, 32, 128)
    for H in (16, 64, 256, 1024)
    for T, D in ((1, 1), (100, 2))
]


@pytest.mark.parametrize(("threads", "known"), MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_plans_of_machines(threads, known, backward):
    topology = known.get("topology", _plan.Topology())
    for N, H, T, D in SIZES:
        found = plan(threads, N, H, T, D, backward, **known)
        assert found.threads <= min(threads, topology.cores or threads), str(found)
        if found.unit_groups > 1:
            assert found.threads <= topology.socket_cores, str(found)
        one = plan(1, N, H, T, D, backward, **known)
        assert found.nanoseconds <= one.nanoseconds, str(found)


def test_threads_that_pay():
    """One row of a small layer pays for a few threads; a large batch for all cores."""
    many = machine(64, 8, 32)
    assert plan(64, 1, 16, **many).threads == 1
    assert plan(64, 1, 64, **many).threads <= 4
    assert plan(64, 1, 256, **many).threads <= 8
    assert plan(64, 128, 1024, **many).threads == 32  # divides the units too, within a socket
    assert plan(64, 128, 1024, **machine(64)).threads == 64
    assert plan(8, 128, 256, **machine(8)).threads == 8


def test_caches_decide():
    """Weights that a core's cache holds are read by all row groups; larger ones are divided."""
    small, large = (machine(2, 2, 2, l2=size << 10) for size in (512, 8192))
    seen = [plan(2, 8, 256, **known).unit_groups for known in (small, large)]
    assert seen == [2, 1]
    far, near = (machine(16, cache_cores, 16) for cache_cores in (2, 16))
    assert plan(16, 1, 512, **far).unit_groups <= plan(16, 1, 512, **near).unit_groups


def test_plan_beside_other_programs():
    """Threads that wait for each other at every step get a core of their own, or are one."""
    assert plan(2, 8, 256).unit_groups == 2
    shared = plan(2, 8, 256, undisturbed=1)
    assert shared.threads == 1 and shared.undisturbed == 1
    assert "other programs leave 1 core" in str(shared)
    assert plan(8, 1, 512, undisturbed=6).threads == 6
    assert plan(2, 4, 64, D=2, undisturbed=1).threads == 1


def test_other_programs_change_no_sum():
    """Threads are fewer only where every sum keeps its order. It depends on the rows of a tile if
    they are fewer than two, and in a backward pass on its columns too."""
    for N, H, D, dtype in product((1, 2, 3, 8, 32), (64, 256), (1, 2), ("float32", "bfloat16")):
        for threads, undisturbed in ((2, 1), (8, 1), (8, 5)):
            same = dict(N=N, H=H, D=D, dtype=dtype)
            alone, shared = plan(threads, **same), plan(threads, **same, undisturbed=undisturbed)
            assert shared.threads <= alone.threads
            if N // alone.row_groups < 2:
                assert alone.row_groups == shared.row_groups
            same["backward"] = True
            alone, shared = plan(threads, **same), plan(threads, **same, undisturbed=undisturbed)
            assert alone.threads == shared.threads


@pytest.mark.parametrize("isa", FLOAT_ISAS)
@pytest.mark.parametrize(
    "problem",
    [
        *(Problem(20, 1, 6, 256, cell=cell, hx=True) for cell in CELLS),
        *(Problem(33, N, 6, 64, dtype=dtype) for N in (4, 5, 8, 13, 40) for dtype in DTYPES),
        Problem(33, 4, 6, 64, directions=2),
    ],
    ids=str,
)
def test_forward_sums_do_not_depend_on_threads(problem, isa):
    """What a plan beside other programs relies on."""
    runtime.set_isa(isa)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        run = run_module(problem, lstm_fused)
        assert run.forward_run["threads"] == threads
        found.append(run.tensors)
    for name in ("y", "h_n"):
        assert torch.equal(found[0][name], found[1][name])


class Load:
    """An estimate, and a clock."""

    def __init__(self, threads=2):
        self.estimate, self.threads, self.now = _plan.LoadEstimate(), threads, 1000 * MS

    def call(self, busy=0, taken=MS):
        """A call beside `busy` programs; how many threads it ran on."""
        threads = self.estimate.undisturbed(self.threads, self.now)
        late = max(0, threads + busy - self.threads) if threads > 1 else 0
        lost = 4 * MS if late else 0
        self.now += taken + lost
        self.estimate.note(threads, taken + lost, lost, late, self.now)
        return threads


def test_load_estimate_of_a_quiet_machine():
    load = Load()
    assert {load.call() for _ in range(1000)} == {2}


def test_one_loss_changes_no_plan():
    load = Load()
    load.call(busy=1)
    assert {load.call() for _ in range(1000)} == {2}


@pytest.mark.parametrize(("threads", "busy", "expected"), [(2, 1, 1), (8, 2, 6), (8, 8, 1)])
def test_load_estimate_beside_programs(threads, busy, expected):
    load = Load(threads)
    seen = [load.call(busy) for _ in range(20_000)]
    assert seen[10] == expected
    assert seen[10:].count(expected) > 0.99 * len(seen)  # the others are trials
    assert seen[10:] != [expected] * len(seen[10:])


def test_a_part_of_the_time_may_be_lost():
    """Less than the threads that lost it contribute."""
    load = Load()
    assert {load.call(busy=1, taken=20 * MS) for _ in range(1000)} == {2}


def test_a_trial_is_put_off_while_other_programs_run():
    """But not for ever: a call of two seconds' distance from the next one is no trial for long."""
    load = Load()
    load.call(busy=1)
    load.call(busy=1)
    seen, tried = [], []
    for call in range(60):
        load.now += 2000 * MS
        if load.estimate.tries(2, load.now):
            load.estimate.put_off(load.now)
        seen.append(load.call(busy=1))
        tried += [call] if seen[-1] == 2 else []
    assert seen[0] == 1 and tried and tried[0] > 20 and seen.count(2) < 3
    load.now += 100_000 * MS
    assert load.estimate.tries(2, load.now) and load.call() == 2


@pytest.mark.parametrize(
    ("running", "online", "idle"), [("1/80", "0-1", 2), ("2/80", "0-1", 1), ("9/700", "0-3,8", -3)]
)
def test_idle_cpus(tmp_path, running, online, idle):
    assert _plan.idle_cpus(str(tmp_path)) > 1000  # no such files
    write(tmp_path, {"proc/loadavg": f"0.20 0.18 0.12 {running} 11206"})
    write(tmp_path, {"sys/devices/system/cpu/online": online})
    assert _plan.idle_cpus(str(tmp_path)) == idle


def test_load_estimate_recovers():
    load = Load(8)
    for _ in range(5000):
        load.call(busy=6)
    seen = [load.call() for _ in range(20_000)]
    assert seen[0] < 8 and seen[-1] == 8


def test_plans_are_fixed_in_tests():
    assert torch.ops.lstm_fused.machine(64)[:2] == [0, 0]
    assert runtime.plan("lstm", torch.float32, 100, 1, 64, 256, 256, 1, threads=2).undisturbed == 0
