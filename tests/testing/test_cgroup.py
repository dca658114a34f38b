import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engram.errors import InputError
from engram.memory.limits import MemoryCgroup, find_memory_cgroup
from engram.testing import cgroup
from engram.testing.cgroup import CgroupUnavailable, LimitedRun, cgroup_unavailable, limited

MB = 1_000_000
ROOT = Path("/")
UNAVAILABLE = cgroup_unavailable()
needs_cgroup = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))
posix_only = pytest.mark.skipif(os.name != "posix", reason="starts programs through sh")


def limited_python(code: str, limit_bytes: int = 100 * MB) -> LimitedRun:
    """Run code in a fresh interpreter under a limit."""
    return limited([sys.executable, "-c", code], limit_bytes, timeout_s=300)


@needs_cgroup
def test_a_program_that_takes_more_than_its_limit_is_killed_and_said_to_be() -> None:
    """200 MB under 100 MB: killed by the kernel, never above the limit, not by the program's own fault."""
    run = limited_python("block = b'1' * 200_000_000")
    assert run.oom_killed
    assert run.returncode == -9
    assert run.peak_usage_bytes <= 100 * MB


@needs_cgroup
def test_what_a_program_holds_is_measured() -> None:
    """50 MB under 100 MB: fits, and the meter shows the block and an interpreter, no more."""
    # Held while the program waits, so that several samples of 20 ms see it.
    run = limited_python("import time; block = b'1' * 50_000_000; time.sleep(0.5); print(len(block))")
    assert (run.returncode, run.stdout, run.oom_killed) == (0, "50000000\n", False)
    assert 50 * MB <= run.peak_unreclaimable_bytes <= 75 * MB
    assert run.peak_usage_bytes >= run.peak_unreclaimable_bytes


@needs_cgroup
def test_shared_memory_and_children_count() -> None:
    """Two processes' memory and their shared memory are one sum, each page counted once."""
    code = """
import mmap, os, time
shared = mmap.mmap(-1, 30_000_000)
shared.write(b"1" * len(shared))
block = b"1" * 20_000_000
if os.fork() == 0:
    seen = sum(shared[::4096]) + sum(block[::4096])
    own = b"1" * 10_000_000
    time.sleep(0.5)
    os._exit(0)
os.wait()
"""
    run = limited_python(code, 200 * MB)
    assert run.returncode == 0
    assert 60 * MB <= run.peak_unreclaimable_bytes <= 85 * MB


@needs_cgroup
def test_page_cache_fills_the_limit_without_harm(tmp_path: Path) -> None:
    """A file of 300 MB read under 100 MB: usage reaches the limit, what cannot be dropped stays small."""
    code = f"""
import os
with open({str(tmp_path / "recording")!r}, "w+b", buffering=0) as file:
    for _ in range(300):
        file.write(bytes(1_000_000))
    os.fsync(file.fileno())
    file.seek(0)
    while file.read(1_000_000):
        pass
"""
    run = limited_python(code)
    assert (run.returncode, run.oom_killed) == (0, False)
    assert run.peak_unreclaimable_bytes < 30 * MB
    assert 70 * MB < run.peak_usage_bytes <= 100 * MB


@needs_cgroup
def test_the_limit_is_in_force_before_the_program_s_first_instruction() -> None:
    """The program finds itself inside a limited group."""
    code = "from engram.memory.limits import memory_limits; print(memory_limits()[0].allowed_bytes)"
    assert int(limited_python(code, 2**27).stdout) == 2**27


@needs_cgroup
def test_environment_folder_input_and_both_outputs_are_the_program_s(tmp_path: Path) -> None:
    """The command runs as `subprocess` would run it, with nothing to read."""
    code = "import os, sys; print(os.environ['FISH'], os.getcwd(), sys.stdin.read() == ''); sys.exit('end')"
    env = {**os.environ, "FISH": "trout"}
    run = limited([sys.executable, "-c", code], 100 * MB, env=env, cwd=tmp_path)
    assert run.stdout == f"trout {tmp_path} True\n"
    assert run.stderr == "end\n"
    assert run.returncode == 1


@needs_cgroup
def test_arguments_reach_the_program_unchanged() -> None:
    """No shell reads the arguments."""
    words = ["a b", "$HOME", "'", '"', "*", ""]
    run = limited([sys.executable, "-c", "import sys; print(sys.argv[1:])", *words], 100 * MB)
    assert run.stdout == f"{words}\n"


@needs_cgroup
def test_a_program_that_does_not_exist_ends_with_127() -> None:
    """As in a shell, and the message names it."""
    run = limited(["no-such-program"], 100 * MB)
    assert run.returncode == 127
    assert "no-such-program" in run.stderr


@needs_cgroup
def test_what_the_command_leaves_behind_is_killed_with_its_group() -> None:
    """A process that outlives the command neither holds the run up nor survives it."""
    code = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid)
"""
    run = limited_python(code)
    assert run.returncode == 0
    assert not running(int(run.stdout))
    assert leftover_groups() == []


@needs_cgroup
def test_a_command_that_takes_too_long_is_killed_and_its_output_kept() -> None:
    """As `subprocess.run` does, and the group is gone all the same."""
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        limited(["sh", "-c", "echo $$; exec sleep 3600"], 100 * MB, timeout_s=1)
    assert not running(int(expired.value.output))
    assert leftover_groups() == []


@needs_cgroup
def test_a_failure_while_watching_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the watch, the command is killed and its group removed."""
    started = []

    def interrupt(process: subprocess.Popen[str], *_: object) -> LimitedRun:
        started.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(cgroup, "_watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        limited_python("import time; time.sleep(3600)")
    assert not running(started[0])
    assert leftover_groups() == []


def running(pid: int) -> bool:
    """Say whether a process still runs; a zombie does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def leftover_groups() -> list[Path]:
    """List groups that this process's runs would have made, near its own."""
    own = find_memory_cgroup()
    if own is None:
        return []
    return [folder for level in own.levels for folder in level.glob(f"engram-{os.getpid()}-*")]


def test_a_machine_without_cgroups_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory controller, tests skip with that reason."""
    monkeypatch.setattr(cgroup, "find_memory_cgroup", lambda: None)
    assert cgroup_unavailable() == "This machine shows no cgroup that carries the memory controller."


def test_v1_groups_that_are_not_writable_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under v1 systemd cannot help a user: the reason names the own group."""
    absent = MemoryCgroup(1, tmp_path / "none/leaf", tmp_path / "none")
    monkeypatch.setattr(cgroup, "find_memory_cgroup", lambda: absent)
    assert str(absent.leaf) in str(cgroup_unavailable())


def test_no_limit_is_not_a_limit() -> None:
    """The kernel would take -1 for unlimited, and the promise would be tested against nothing."""
    with pytest.raises(InputError):
        limited(["true"], -1)


@posix_only
def test_a_group_that_takes_no_process_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is no cgroup cannot be limited: the reason says so, and it is left as it was."""
    monkeypatch.setattr(cgroup, "find_memory_cgroup", lambda: MemoryCgroup(1, tmp_path, tmp_path))
    monkeypatch.setattr(cgroup, "_limit", refuse_limit)
    with pytest.raises(CgroupUnavailable, match="refused"):
        limited(["true"], MB)
    assert list(tmp_path.iterdir()) == []


def refuse_limit(*_: object) -> None:
    """Stand in for a kernel that refuses."""
    raise CgroupUnavailable("refused")


@pytest.mark.parametrize(("controllers", "takes"), [("cpu memory pids\n", True), ("cpu pids\n", False)])
def test_v2_groups_hand_memory_down_only_where_told_to(tmp_path: Path, controllers: str, takes: bool) -> None:
    """A v2 group whose subtree_control lacks memory can hold no limited group."""
    (tmp_path / "cgroup.subtree_control").write_text(controllers)
    (tmp_path / "cgroup.procs").touch()
    assert cgroup._takes_groups(tmp_path, 2) is takes


@pytest.fixture
def only_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stage a v2 machine with no writable group; returns the script that plays systemd-run."""
    mount = tmp_path / "cgroups"
    mount.mkdir()

    def find(root: Path = ROOT, pid: int | None = None) -> MemoryCgroup:
        scopes = list(mount.glob("*.scope")) if pid else []
        return MemoryCgroup(2, scopes[0], mount) if scopes else MemoryCgroup(2, mount / "x/leaf", mount / "x")

    monkeypatch.setattr(cgroup, "find_memory_cgroup", find)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    script = tmp_path / "systemd-run"
    script.touch(mode=0o755)
    return script


SCOPE_SCRIPT = """#!/bin/sh
for word do
    shift
    case "$word" in
        --unit=*) scope={mount}/new; name="${{word#--unit=}}"; mkdir "$scope" ;;
        MemoryMax=*) echo "${{word#MemoryMax=}}" >"$scope/memory.max" ;;
        --) break ;;
    esac
done
: >"$scope/cgroup.procs"
echo 211000 >"$scope/memory.peak"
printf 'max 3\\noom_kill 0\\n' >"$scope/memory.events"
printf 'anon 101\\nfile 999983\\nshmem 307\\npagetables 2\\nslab_reclaimable 999983\\n' >"$scope/memory.stat"
mv "$scope" "{mount}/$name"
exec "$@"
"""


@posix_only
def test_where_no_group_is_writable_the_user_s_systemd_makes_a_scope(only_systemd: Path) -> None:
    """The command runs in the scope, with v2's meters: page cache and droppable kernel memory left out."""
    mount = only_systemd.parent / "cgroups"
    only_systemd.write_text(SCOPE_SCRIPT.format(mount=mount))
    run = limited(["sh", "-c", f"cat {mount}/*.scope/memory.max"], 100 * MB)
    assert run.stdout == "100000000\n"
    assert run.meter == "cgroup v2"
    assert run.peak_unreclaimable_bytes == 101 + 307 + 2
    assert run.peak_usage_bytes == 211_000
    assert not run.oom_killed


@posix_only
@pytest.mark.parametrize(("signal", "oom_killed"), [("KILL", True), ("TERM", False)])
def test_a_scope_that_went_with_a_killed_program_was_out_of_memory(
    only_systemd: Path, signal: str, oom_killed: bool
) -> None:
    """systemd removes the counters with the scope; a SIGKILL that nobody here sent is the kernel's."""
    mount = only_systemd.parent / "cgroups"
    only_systemd.write_text(SCOPE_SCRIPT.format(mount=mount))
    run = limited(["sh", "-c", f"rm -r {mount}/*.scope; kill -{signal} $$"], 100 * MB)
    assert run.oom_killed is oom_killed


@posix_only
def test_systemd_s_own_words_are_the_reason(only_systemd: Path) -> None:
    """Where systemd-run fails, tests skip with what it said."""
    only_systemd.write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2\nexit 1\n")
    assert "Failed to connect to bus" in str(cgroup_unavailable())


@posix_only
def test_a_scope_without_the_memory_controller_is_no_limit(only_systemd: Path) -> None:
    """A systemd that was not given the memory controller takes the limit and ignores it."""
    script = SCOPE_SCRIPT.format(mount=only_systemd.parent / "cgroups")
    only_systemd.write_text(script.replace('echo "${word#MemoryMax=}" >"$scope/memory.max"', ":"))
    assert "may not limit memory" in str(cgroup_unavailable())
