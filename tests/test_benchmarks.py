"""The benchmark of readers compares like with like, and its results are what others may rely on."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Find ``benchmarks`` as its command does, which runs in the repository's root."""
    monkeypatch.syspath_prepend(ROOT)


def load(name: str) -> ModuleType:
    """Import a module of the benchmark."""
    return importlib.import_module(f"benchmarks.loading.{name}")


LIBRARIES = (
    "engram", "numpy", "h5py", "lmdb", "zarr", "tensorstore", "litdata", "grain", "datasets", "webdataset",
    "tensordict", "scDataset", "braindecode",
)  # fmt: skip

PROGRAM = """
import json, sys
from pathlib import Path
from benchmarks.loading import cell, corpus
from benchmarks.loading.readers import READERS

if __name__ == "__main__":  # a worker that is spawned imports this
    root, distribution = Path(sys.argv[1]), sys.argv[2]
    whole = corpus.Corpus(root / "corpus", 2)
    corpus.write_corpus(whole)
    for reader in READERS.values():
        if reader.distribution != distribution:
            continue
        folder = root / reader.form
        task = {"reader": reader.name, "folder": str(folder), "corpus": str(whole.path), "n_recordings": 2}
        if not folder.exists():
            folder.mkdir()
            cell.main(cell.Task(**task, is_preparation=True))
        for regime in {"warm", "overlap"} & {*reader.regimes}:
            stride = 100 if regime == "overlap" else 200
            found = cell.main(cell.Task(**task, stride_samples=stride, seconds=0.01, warm_up_s=0))
            assert found["windows_per_s"] > 0
            print(reader.name, regime)
"""


@pytest.mark.slow
@pytest.mark.parametrize("distribution", LIBRARIES)
def test_every_reader_delivers_the_bytes_of_the_corpus(distribution: str, tmp_path: Path) -> None:
    """A reader's batches hold the windows that they say, bit for bit; else its process fails."""
    readers = [each for each in load("readers").READERS.values() if each.distribution == distribution]
    for reader in readers:
        if library := load("run").missing_library(reader):
            pytest.skip(f"{library} is not installed (make bench installs it)")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), distribution],
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for reader in readers:
        assert reader.name in done.stdout


def test_every_library_is_tested() -> None:
    """No reader is added without its bytes being compared."""
    assert {each.distribution for each in load("readers").READERS.values()} == {*LIBRARIES}


def test_a_wrong_byte_is_no_row(tmp_path: Path) -> None:
    """A reader that delivers one wrong value is refused."""
    torch = pytest.importorskip("torch")
    cell, corpus = load("cell"), load("corpus")
    whole = corpus.Corpus(tmp_path / "corpus", 1)
    corpus.write_corpus(whole)
    starts = whole.starts(200)
    windows = torch.from_numpy(next(whole.windows())[:64]).float()
    batch = (torch.arange(64), windows)
    assert cell.check([batch], whole, starts) == 1
    windows[63, 128, 199] += 1
    with pytest.raises(cell.WrongBatch, match="is not what the corpus has there"):
        cell.check([batch], whole, starts)


def test_windows_that_overlap_stay_within_their_recording(tmp_path: Path) -> None:
    """No window reaches from one recording into the next one."""
    starts = load("corpus").Corpus(tmp_path / "corpus", 2).starts(100)
    assert len(starts) == 2 * 799
    assert {start // 80_000 for start in starts} == {(start + 199) // 80_000 for start in starts} == {0, 1}


def test_ratios_name_the_peer_that_they_are_against() -> None:
    """A promise is told against the fastest peer of its kind, and not against a reader that was killed."""
    results = load("results")
    rows = [
        row(results, "engram", 300.0),
        row(results, "slow", 50.0, kind="one by one"),
        row(results, "fast", 100.0, kind="one by one"),
        row(results, "gone", 0.0, kind="one by one", outcome="killed"),
    ]
    ratios = results.ratios_of(rows)
    assert ratios["warm: x the best reader window by window"] == {"ratio": 3.0, "peer": "fast", "workers": 0}
    assert ratios["capped: x tensorstore"] is None


def test_a_fraction_is_of_what_the_machine_could_do_in_that_minute() -> None:
    """Each round is divided by its own limit: a machine that is slow for one of them changes no median."""
    results, run, reader = load("results"), load("run"), load("readers").READERS["engram"]
    rates = {"warm": (60_000, 30_000, 70_000), "capped": (20_000, 10_000, 30_000)}
    limits = {"warm": [10.32, 5.16, 10.32], "capped": [1.25, 0.625, 1.25]}
    outcome = run.Outcome({}, {reader.form: 0}, {})
    for regime, found in rates.items():
        measured = [load("cell").Measured(1, each, 0.0, 50_000.0, 0.0, 0.0) for each in found]
        outcome.runs[run.Cell(reader, 0, regime)] = run.Runs(measured, limits[regime])
    ratios = results.ratios_of(results.rows_of(outcome))
    assert ratios["warm: fraction of np.copyto"] == {"median": 0.6, "min": 0.6, "max": 0.7}
    of_disk = ratios["capped: fraction of the disk's random reads, in bytes from the disk"]
    assert of_disk == {"median": 0.8, "min": 0.8, "max": 1.2}


def test_a_round_that_read_the_disk_in_the_page_cache_s_regime_does_not_count() -> None:
    """Other rounds do; a cell that has none has no row, and the reason is told."""
    results, run, reader = load("results"), load("run"), load("readers").READERS["engram"]
    cold = "9,000 bytes a window came from the disk in the warm regime"
    measured = load("cell").Measured(1, 100.0, 0.0, 50_000.0, 0.0, 0.0)
    sometimes, never = run.Cell(reader, 0, "warm"), run.Cell(reader, 2, "warm")
    runs = {sometimes: run.Runs([measured], cold=cold), never: run.Runs(cold=cold)}
    rows = results.rows_of(run.Outcome(runs, {reader.form: 0}, {}))
    assert [(row.workers, row.rounds) for row in rows] == [(0, 1)]
    assert {cell.workers: each.failure for cell, each in runs.items()} == {0: "", 2: cold}


def row(results: ModuleType, reader: str, windows_per_s: float, **fields: object) -> object:
    """Make a row of the warm regime."""
    values = {
        **dict.fromkeys(results.Row.__dataclass_fields__, 0),
        "reader": reader, "regime": "warm", "outcome": "measured", "kind": "own loader", "shuffle": "global",
        "windows_per_s": windows_per_s,
    }  # fmt: skip
    return results.Row(**(values | fields))


def test_the_published_results_have_the_fields_that_are_promised() -> None:
    """Every entry says who delivered how much in which regime with which memory, and ours is there."""
    entries = json.loads((RESULTS / "latest.json").read_text(encoding="utf-8"))
    for entry in entries:
        assert {"reader", "regime", "windows_per_s", "gb_per_s", "peak_mb"} <= entry.keys()
    assert {entry["regime"] for entry in entries if entry["reader"] == "engram"} == {
        "warm",
        "capped",
        "overlap",
    }


def test_the_page_is_what_the_published_results_say() -> None:
    """Nobody has edited a figure of the page by hand, nor published results without it."""
    rows, machine = load("results").load(RESULTS)
    page = (ROOT / "docs" / "reference" / "benchmarks.md").read_text(encoding="utf-8")
    assert load("page").markdown(rows, machine) in page
