import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from engram.errors import InputError
from engram.memory import usage
from engram.memory.limits import (
    Limit,
    MemoryCgroup,
    binding_limit,
    disk_limit,
    find_memory_cgroup,
    memory_limits,
    shm_limit,
)
from engram.memory.usage import Usage

GIB = 1 << 30
OWN = 104_729
V2_MOUNT = "31 23 0:28 {root} {point} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {root} {point} rw,relatime - cgroup cgroup rw,{controller}\n"
HOST = {"proc/meminfo": f"MemTotal: 999 kB\nMemAvailable:   {64 << 20} kB\n"}
NONE: Mapping[str, str] = {}


@pytest.fixture(autouse=True)
def own_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process tree hold a known number of bytes."""
    monkeypatch.setattr(usage, "read_usage", lambda **_: Usage(OWN, 1, "scripted"))


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """Write made-up files of ``/proc`` and ``/sys``."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(
    folder: str, limit: str, *, high: str = "max", used: int = 0, files: tuple[int, int] = (0, 0)
) -> dict[str, str]:
    """Files of one v2 group."""
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\nactive_file {files[0]}\ninactive_file {files[1]}\nshmem 2\n",
    }


def v1(folder: str, limit: int, *, used: int = 0, active: int = 0, inactive: int = 0) -> dict[str, str]:
    """Files of one v1 group; figures of the group alone, which must not be used, are wrong on purpose."""
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": (
            "active_file 999983\ninactive_file 999983\n"
            f"total_active_file {active}\ntotal_inactive_file {inactive}\n"
        ),
    }


V1_UNLIMITED = 9223372036854771712


@pytest.fixture
def slurm_v2(tmp_path: Path) -> Path:
    """Plant a SLURM job under v2: limits on job and step, none on the leaf."""
    slices = "sys/fs/cgroup/system.slice/node1_slurmstepd.scope"
    step = f"{slices}/job_7/step_0"
    return plant(
        tmp_path,
        {
            **HOST,
            "proc/self/cgroup": f"0::/{step.removeprefix('sys/fs/cgroup/')}/user/task_0\n",
            "proc/self/mountinfo": V2_MOUNT.format(root="/", point="/sys/fs/cgroup"),
            **v2(f"{step}/user/task_0", "max", used=1),
            **v2(f"{step}/user", "max", used=1),
            **v2(step, str(8 * GIB), high=str(7 * GIB), used=5 * GIB, files=(GIB, 2 * GIB)),
            **v2(f"{slices}/job_7", str(8 * GIB + 2), used=6 * GIB, files=(3, 5)),
            **v2(slices, "max"),
        },
    )


def test_limits_above_the_leaf_are_found(slurm_v2: Path) -> None:
    """SLURM sets its limits on step and job: the walk goes from leaf to root, high noted beside max."""
    step, high, job, host = memory_limits(slurm_v2, NONE)
    where = slurm_v2 / "sys/fs/cgroup/system.slice/node1_slurmstepd.scope/job_7"
    assert step == Limit("cgroup v2", 8 * GIB, 2 * GIB, str(where / "step_0/memory.max"))
    assert high == Limit("cgroup v2 high", 7 * GIB, 2 * GIB, str(where / "step_0/memory.high"))
    assert job == Limit("cgroup v2", 8 * GIB + 2, 6 * GIB - 8, str(where / "memory.max"))
    assert host.kind == "host"


def test_the_limit_that_binds_leaves_least(slurm_v2: Path) -> None:
    """The job's limit is larger than the step's, but more of it is taken."""
    binding = binding_limit(slurm_v2, NONE)
    assert binding.where.endswith("job_7/memory.max")
    assert binding.free_bytes == 2 * GIB + 10


def test_page_cache_never_counts_as_used(slurm_v2: Path) -> None:
    """Active and inactive file pages are both reclaimable: 5 GiB charged, 3 of them files, are 2 used."""
    assert memory_limits(slurm_v2, NONE)[0].used_bytes == (5 - 1 - 2) * GIB


def test_v1_limits_use_the_totals_of_the_subtree(tmp_path: Path) -> None:
    """In v1 usage contains the groups below, so their page cache must be subtracted as well."""
    mount = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "9:name=systemd:/user\n4:memory:/slurm/job_7\n1:cpu,cpuacct:/\n",
        "proc/self/mountinfo": V1_MOUNT.format(root="/", point="/sys/fs/cgroup/cpu", controller="cpu")
        + V1_MOUNT.format(root="/", point=f"/{mount}", controller="memory"),
        **v1(f"{mount}/slurm/job_7", 4 * GIB, used=GIB, active=101, inactive=307),
        **v1(f"{mount}/slurm", V1_UNLIMITED),
        **v1(mount, V1_UNLIMITED),
    }
    job, host = memory_limits(plant(tmp_path, files | HOST), NONE)
    assert job == Limit(
        "cgroup v1", 4 * GIB, GIB - 101 - 307, str(tmp_path / mount / "slurm/job_7/memory.limit_in_bytes")
    )
    assert host.kind == "host"


def test_on_a_hybrid_host_the_hierarchy_with_the_memory_controller_counts(tmp_path: Path) -> None:
    """Both hierarchies mounted, memory listed under v1: v2's files are not for memory."""
    files = {
        "proc/self/cgroup": "4:memory:/job\n0::/job\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/", point="/sys/fs/cgroup/unified")
        + V1_MOUNT.format(root="/", point="/sys/fs/cgroup/memory", controller="memory"),
        **v1("sys/fs/cgroup/memory/job", 3 * GIB),
        **v2("sys/fs/cgroup/unified/job", str(GIB)),
    }
    mount = tmp_path / "sys/fs/cgroup/memory"
    assert find_memory_cgroup(plant(tmp_path, files | HOST)) == MemoryCgroup(1, mount / "job", mount)
    assert [limit.allowed_bytes for limit in memory_limits(tmp_path, NONE)[:-1]] == [3 * GIB]


def test_on_a_hybrid_host_memory_may_be_in_v2(tmp_path: Path) -> None:
    """Other controllers under v1 do not hide a memory controller in v2."""
    files = {
        "proc/self/cgroup": "4:cpu:/job\n0::/job\n",
        "proc/self/mountinfo": V1_MOUNT.format(root="/", point="/sys/fs/cgroup/cpu", controller="cpu")
        + V2_MOUNT.format(root="/", point="/sys/fs/cgroup/unified"),
        **v2("sys/fs/cgroup/unified/job", str(GIB)),
    }
    assert [limit.allowed_bytes for limit in memory_limits(plant(tmp_path, files | HOST), NONE)[:-1]] == [GIB]


@pytest.mark.parametrize("path", ["/docker/abc", "/../../system.slice/job"])
def test_in_a_container_that_hides_the_path_the_mount_is_the_group(tmp_path: Path, path: str) -> None:
    """A path that leads nowhere, or out of the namespace, falls back to what is mounted."""
    files = {
        "proc/self/cgroup": f"0::{path}\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/", point="/sys/fs/cgroup"),
        **v2("sys/fs/cgroup", str(2 * GIB), used=211),
        "system.slice/job/memory.max": "1\n",
    }
    (limit, _) = memory_limits(plant(tmp_path, files | HOST), NONE)
    assert limit == Limit("cgroup v2", 2 * GIB, 211, str(tmp_path / "sys/fs/cgroup/memory.max"))


def test_a_container_may_mount_its_own_group(tmp_path: Path) -> None:
    """Where the mount shows a group from below the root, the path is counted from that group."""
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc/worker\n",
        "proc/self/mountinfo": V1_MOUNT.format(
            root="/docker/abc", point="/sys/fs/cgroup/memory", controller="memory"
        ),
        **v1("sys/fs/cgroup/memory", 3 * GIB),
        **v1("sys/fs/cgroup/memory/worker", 2 * GIB),
    }
    found = [limit.allowed_bytes for limit in memory_limits(plant(tmp_path, files | HOST), NONE)]
    assert found[:-1] == [2 * GIB, 3 * GIB]


def test_the_mount_on_which_the_path_is_visible_is_taken(tmp_path: Path) -> None:
    """Of two mounts of one hierarchy the one that shows this group; a space in its path is unescaped."""
    files = {
        "proc/self/cgroup": "0::/job\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/other", point="/mnt/other")
        + V2_MOUNT.format(root="/", point="/mnt/my\\040groups"),
        **v2("mnt/my groups/job", str(GIB)),
    }
    assert memory_limits(plant(tmp_path, files | HOST), NONE)[0].allowed_bytes == GIB


def test_no_limits_but_the_host_s(tmp_path: Path) -> None:
    """Unlimited groups, no memory controller, or no cgroups at all leave what the host has."""
    files = {
        "proc/self/cgroup": "0::/job\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/", point="/sys/fs/cgroup"),
        **v2("sys/fs/cgroup/job", "max"),
    }
    host = Limit("host", (64 << 30) + OWN, OWN, str(tmp_path / "proc/meminfo"))
    assert memory_limits(plant(tmp_path, HOST), NONE) == (host,)
    assert memory_limits(plant(tmp_path, files), NONE) == (host,)
    shutil.rmtree(tmp_path / "sys")
    assert memory_limits(tmp_path, NONE) == (host,)
    (tmp_path / "proc/self/mountinfo").unlink()
    assert memory_limits(tmp_path, NONE) == (host,)


def test_without_meminfo_psutil_knows_the_host(tmp_path: Path) -> None:
    """Neither macOS nor Windows has no /proc/meminfo."""
    (host,) = memory_limits(tmp_path, NONE)
    assert host.where == "psutil.virtual_memory"
    assert host.free_bytes > 0


@pytest.mark.parametrize(
    ("env", "mib", "where"),
    [
        ({"SLURM_MEM_PER_NODE": "4099"}, 4099, "SLURM_MEM_PER_NODE"),
        (
            {"SLURM_MEM_PER_CPU": "1009", "SLURM_CPUS_ON_NODE": "7"},
            1009 * 7,
            "SLURM_MEM_PER_CPU x SLURM_CPUS_ON_NODE",
        ),
    ],
)
def test_slurm_s_variables_are_a_limit_in_mib(
    tmp_path: Path, env: dict[str, str], mib: int, where: str
) -> None:
    """What SLURM was asked for counts against this tree's own use, enforced or not."""
    assert memory_limits(plant(tmp_path, HOST), env)[0] == Limit("SLURM", mib << 20, OWN, where)


@pytest.mark.parametrize("env", [{"SLURM_MEM_PER_NODE": "0"}, {"SLURM_MEM_PER_CPU": "1009"}])
def test_slurm_may_set_no_limit(tmp_path: Path, env: dict[str, str]) -> None:
    """0 is the whole node; memory per CPU without CPUs is a login node's shell."""
    assert [limit.kind for limit in memory_limits(plant(tmp_path, HOST), env)] == ["host"]


@pytest.mark.parametrize("text", ["64G", "-1", ""])
def test_a_slurm_variable_that_is_no_number_is_named(tmp_path: Path, text: str) -> None:
    """A limit that cannot be read is an error with its name and value."""
    with pytest.raises(InputError, match=f"SLURM_MEM_PER_NODE is '{text}'"):
        memory_limits(plant(tmp_path, HOST), {"SLURM_MEM_PER_NODE": text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sys/fs/cgroup/job/memory.max", "12 GB\n"),
        ("sys/fs/cgroup/job/memory.max", "1\n2\n"),
        ("sys/fs/cgroup/job/memory.high", "-1\n"),
        ("sys/fs/cgroup/job/memory.current", ""),
        ("sys/fs/cgroup/job/memory.stat", "anon many\n"),
        ("proc/self/cgroup", "nonsense\n"),
        ("proc/self/mountinfo", "31 23 - cgroup2\n"),
    ],
)
def test_a_file_that_cannot_be_understood_is_named(tmp_path: Path, name: str, text: str) -> None:
    """Nothing malformed is taken for "no limit": the error names the file."""
    files = {
        "proc/self/cgroup": "0::/job\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/", point="/sys/fs/cgroup"),
        **v2("sys/fs/cgroup/job", str(GIB)),
    }
    with pytest.raises(InputError, match=name):
        memory_limits(plant(tmp_path, files | HOST | {name: text}), NONE)


def test_a_sandbox_without_memory_stat_has_limits_all_the_same(tmp_path: Path) -> None:
    """Where page cache is not told apart, all that is charged counts: too high, never too low."""
    files = {
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": V2_MOUNT.format(root="/", point="/sys/fs/cgroup"),
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": "211\n",
    }
    assert memory_limits(plant(tmp_path, files | HOST), NONE)[0].used_bytes == 211


def test_free_is_never_negative() -> None:
    """A group may hold more than a limit that was lowered under it."""
    assert Limit("cgroup v2 high", allowed_bytes=101, used_bytes=211, where="memory.high").free_bytes == 0


def test_the_levels_end_at_the_mount() -> None:
    """From leaf to mount, both included, no further."""
    mount = Path("/sys/fs/cgroup")
    group = MemoryCgroup(2, mount / "a/b", mount)
    assert group.levels == (mount / "a/b", mount / "a", mount)
    assert MemoryCgroup(2, mount, mount).levels == (mount,)


def test_disk_room_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    """A store that is yet to be written counts for the disk it will lie on, as this user may fill it."""
    limit = disk_limit(tmp_path / "a/b/store")
    assert limit.where == str(tmp_path)
    figures = os.statvfs(tmp_path)
    assert limit.allowed_bytes <= figures.f_blocks * figures.f_frsize
    # Other processes write meanwhile; the blocks kept for root are what must not be in it.
    assert limit.free_bytes == pytest.approx(figures.f_bavail * figures.f_frsize, rel=0.05)


def test_a_relative_path_lies_below_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may be named by a relative path."""
    monkeypatch.chdir(tmp_path)
    assert disk_limit(Path("store")).where == str(tmp_path)


def test_dev_shm_has_a_size_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file system's figures; none without the folder, none for a tmpfs without a size."""
    assert shm_limit(tmp_path) is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    limit = shm_limit(tmp_path)
    assert limit is not None
    assert (limit.kind, limit.where) == ("/dev/shm", str(tmp_path / "dev/shm"))
    assert limit.allowed_bytes > limit.used_bytes > 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert shm_limit(tmp_path) is None
