"""``engram bench``, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from engram.batches.speed import Speed
from engram.cli import app
from engram.preparation.ingest import prepare
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.testing.cgroup import cgroup_unavailable, limited
from engram.testing.stores import digest


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 8 recordings of 32 channels, 41 MB, and one of another form."""
    path = tmp_path_factory.mktemp("bench") / "store"
    eeg = ArraySignal(np.random.default_rng(0).normal(0, 20, (80_000, 32)).astype(np.float32), 100.0)
    recordings = {f"r{number}": ArrayRecording({"eeg": eeg}) for number in range(8)}
    recordings["short"] = ArrayRecording({"eeg": ArraySignal(np.zeros((200, 3), np.float32), 100.0)})
    prepare(ArraySource(recordings), path).store.close()
    return path


def run(*words: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, ["bench", *(str(word) for word in words)], catch_exceptions=False)


def test_json_names_every_figure(store: Path) -> None:
    """The figures, what they are of, the limit in words, and how the disk was made to be asked."""
    before = digest(store)
    found = json.loads(run(store, "--seconds", 0.1, "--json").stdout)

    assert digest(store) == before
    assert (found["signal"], found["window_s"], found["n_windows"]) == ("eeg", 2.0, 3200)
    assert found["left_out"] == {"other channels": 1}
    assert found["warm"]["windows_per_s"] > 0
    assert found["warm"]["fraction_of_memcpy"] == pytest.approx(
        found["warm"]["gb_per_s"] / found["memcpy_gb_per_s"]
    )
    assert set(found["capped"]) == {*Speed.__dataclass_fields__, "fraction_of_medium", "how"}
    assert found["capped"]["how"] in ("evicted", "not measured")
    for name in ("medium_gb_per_s", "read_ahead_kb", "limit", "advice", "notes"):
        assert name in found


def test_the_table_names_the_limit(store: Path) -> None:
    """A person reads what was measured, both speeds, the limit and what helps, and what was left out."""
    told = run(store, "--seconds", 0.1, "--batch-size", 16).stdout
    assert "eeg: 3,200 windows of 2 s, 12.5 KiB each in the store; shuffled, batches of 16" in told
    for words in ("from memory", "% of copying in memory", "limit: ", "read-ahead of the disk: "):
        assert words in told
    assert "Left out: 1 other channels." in told


def test_what_was_not_measured_as_asked_is_said(store: Path) -> None:
    """Windows longer than the recordings, and a store too small to tell, are told; nulls stay null."""
    told = run(store, "--seconds", 0.1, "--window-s", 5000).stdout
    assert "Windows are of 800 s, not 5000 s: half of the recordings are shorter." in told
    assert "limit: not known" in told
    assert "too few windows" in told


def test_it_says_where_the_page_cache_is_passed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way windows were read is a figure, and a line."""
    assert json.loads(run(store, "--seconds", 0.1, "--json").stdout)["is_direct"] is False
    monkeypatch.setattr("engram.batches.loader._is_cache_useless", lambda *_: True)
    found = json.loads(run(store, "--seconds", 0.1, "--json").stdout)
    if not found["is_direct"]:
        pytest.skip("temporary files cannot be read past the page cache here")
    if found["capped"]["fraction_of_medium"] is not None:
        assert any("came past the page cache" in note for note in found["notes"])


def test_a_disk_that_was_not_measured_has_no_figures(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot be asked to forget files gives nulls, and says why."""
    monkeypatch.setattr("engram.batches.speed.can_forget", lambda: False)
    found = json.loads(run(store, "--seconds", 0.1, "--json").stdout)
    assert {found["capped"][name] for name in ("windows_per_s", "gb_per_s", "fraction_of_medium")} == {None}
    assert found["capped"]["how"] == "not measured"
    assert found["medium_gb_per_s"] is None
    assert "the disk was not measured" in found["notes"][-1]
    assert "from the disk" not in run(store, "--seconds", 0.1).stdout.partition("limit:")[0]


def test_windows_from_memory_are_no_disk(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk's bytes are not counted, the table says that files were forgotten, and no share."""
    for module in ("engram.batches.speed", "engram.store.medium"):
        monkeypatch.setattr(f"{module}.total_disk_bytes", lambda: None)
    told = run(store, "--seconds", 0.1).stdout
    assert "files forgotten" in told
    assert "The disk was not measured: when the kernel was asked to forget the files" in told


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere"], 4, "holds no store"),
        (["--signal", "emg"], 2, "No recording has a signal 'emg'"),
        (["--seconds", "0"], 2, "above zero"),
        (["--batch-size", "0"], 2, "batch"),
        (["--memory", "much"], 2, "is not a size"),
    ],
)
def test_what_cannot_be_measured_is_one_line(store: Path, words: list[str], code: int, said: str) -> None:
    """A missing store is exit code 4, a setting that is none 2, each with a line that says so."""
    command = [
        sys.executable,
        "-m",
        "engram",
        "bench",
        *([] if words == ["nowhere"] else [str(store)]),
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith("engram: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_torch_the_extra_is_named(store: Path) -> None:
    """Measuring takes torch: without it the error names what to install."""
    code = "import sys; sys.modules['torch'] = None; from engram.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", str(store)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "torch is not installed" in done.stderr


def test_an_interrupt_ends_it_cleanly(store: Path) -> None:
    """Ctrl-C in the middle of a long measurement: exit code 130, at once, and one line."""
    code = "\n".join(
        [
            "import engram.store.medium as medium, os, signal, sys",
            "plain = medium.read_at_random",
            "def reading(*a, **b):",
            "    os.kill(os.getpid(), signal.SIGINT)",
            "    return plain(*a, **b)",
            "medium.read_at_random = reading",
            "from engram.cli import main",
            f"sys.argv = ['engram', 'bench', {str(store)!r}, '--seconds', '0.1']",
            "main()",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(cgroup_unavailable() is not None, reason=str(cgroup_unavailable()))
def test_it_keeps_within_a_limit(store: Path) -> None:
    """Where memory is short, what is copied and held is smaller, and nothing is killed."""
    command = [sys.executable, "-m", "engram", "bench", str(store), "--seconds", "0.5", "--json"]
    done = limited(command, 400_000_000)
    assert (done.returncode, done.oom_killed) == (0, False), done.stderr
    found = json.loads(done.stdout)
    assert found["memcpy_bytes"] < 100_000_000
    assert any("memory is short" in note for note in found["notes"])
