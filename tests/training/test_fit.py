"""A training leaves its folder, its scores and this process as promised."""

from __future__ import annotations

import functools
import os
import random
import runpy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import engram
from engram.batches.windows import SplitWindows, Windows
from engram.errors import InputError, MemoryExceeded, StoreNotWritable
from engram.ledger import Ledger
from engram.memory import Limit, Usage, watch_peak
from engram.store.reader import Store
from engram.training import fit as fit_module
from engram.training import watch as watch_module
from engram.training.fit import Progress, fit
from engram.training.resume import get_rng, set_rng
from engram.training.settings import FitSettings
from engram.training.watch import MemoryWatch
from engram.windows.spec import FixedWindows, Span
from engram.windows.splits import Side, Split
from engram.windows.targets import RecordingColumn, SignalTarget

program = runpy.run_path(str(Path(__file__).with_name("program.py")))
train: Callable[..., Any] = program["train"]
CPU: dict[str, Any] = {"accelerator": "cpu", "batch_size": 8}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 8 recordings."""
    path = tmp_path_factory.mktemp("prepared") / "store"
    program["make_store"](path).close()
    return path


@pytest.fixture
def store(prepared: Path) -> Iterator[Store]:
    """Open the store."""
    with_windows = Store(prepared)
    yield with_windows
    with_windows.close()


@pytest.fixture
def sides(store: Store) -> SplitWindows:
    """40 windows to train on, 20 to validate, 20 to test."""
    found: SplitWindows = program["make_sides"](store)
    return found


def test_a_training_leaves_checkpoints_predictions_and_a_ledger(sides: SplitWindows, tmp_path: Path) -> None:
    """And nothing half-written."""
    fitted = train(sides, tmp_path / "made" / "training")
    files = sorted(
        str(path.relative_to(fitted.folder)) for path in fitted.folder.rglob("*") if path.is_file()
    )
    files = [file for file in files if file != ".lock"]  # some systems leave it, some do not
    assert files == ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "ledger.json", "predictions.parquet"]
    assert Ledger.read(fitted.folder) == fitted.ledger


def test_the_ledger_says_what_was_done(sides: SplitWindows, tmp_path: Path) -> None:
    """Settings, versions, data, sides, epochs, memory, scores with chance."""
    ledger = train(sides, tmp_path, memory_every_steps=2).ledger
    assert (ledger.task, ledger.main_metric, ledger.within_subject) == ("regression", "nrmse", False)
    assert ledger.recipe["training"]["learning_rate"] == 1e-2
    assert ledger.recipe["target"] == {
        "kind": "RecordingColumn",
        "column": "age",
        "task": "regression",
        "classes": [],
    }
    assert {"python", "engram", "torch", "lightning"} <= set(ledger.versions)
    assert ledger.data["n_windows"] == 80
    assert ledger.data["store_bytes"] > 8 * 500 * 4 * 2
    assert [(line.side, line.n_windows, line.n_recordings, line.n_subjects) for line in ledger.sides] == [
        ("train", 40, 4, 4),
        ("valid", 20, 2, 2),
        ("test", 20, 2, 2),
    ]
    assert [line.epoch for line in ledger.epochs] == [0, 1, 2]
    assert all(line.windows_per_s > 0 and line.valid_loss is not None for line in ledger.epochs)
    assert len(ledger.memory) > 5
    assert 0 < ledger.peak_bytes < ledger.allowed_bytes
    assert ledger.n_parameters == sum(p.numel() for p in program["Network"]().parameters())
    assert {(score.side, score.metric) for score in ledger.scores} == {
        (side, metric) for side in ("valid", "test") for metric in ("nrmse", "pearson_r", "mae")
    }


def test_predictions_are_those_of_the_best_weights(sides: SplitWindows, tmp_path: Path) -> None:
    """Every validation and test window once; the scores are computed from them."""
    fitted = train(sides, tmp_path)
    table = pq.read_table(tmp_path / "predictions.parquet").to_pandas()
    assert sides.test is not None
    network = fitted.model.eval()
    with torch.no_grad():
        expected = network(sides.test.read(np.arange(20)).X)
    rows = table[table["side"] == "test"]
    assert rows["window"].tolist() == list(range(20))
    assert rows["subject"].tolist() == ["s6"] * 10 + ["s7"] * 10
    np.testing.assert_allclose(rows["prediction"], expected[:, 0], rtol=1e-5)
    rmse = float(np.sqrt(np.mean((rows["prediction"] - rows["target"]) ** 2)))
    (score,) = (s for s in fitted.ledger.scores if (s.side, s.metric) == ("test", "nrmse"))
    np.testing.assert_allclose(score.value, rmse / rows["target"].std(ddof=0), rtol=1e-6)


def test_the_best_epoch_is_that_of_the_best_validation_score(sides: SplitWindows, tmp_path: Path) -> None:
    """A learning rate that is much too high makes later epochs worse."""
    fitted = train(sides, tmp_path, epochs=5, learning_rate=1.0, optimizer="adamw")
    scores = [line.valid_score for line in fitted.ledger.epochs]
    assert fitted.ledger.best_epoch == int(np.argmin(scores))
    (score,) = (s for s in fitted.ledger.scores if (s.side, s.metric) == ("valid", "nrmse"))
    assert score.value == min(scores)


def test_early_stopping_ends_a_training_that_gets_no_better(sides: SplitWindows, tmp_path: Path) -> None:
    """After so many epochs without a better validation score, and says so."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * 0).expand(len(x), 1)

    settings = FitSettings(epochs=9, patience=2, **CPU)
    ledger = fit(Constant(), sides, tmp_path, settings).ledger
    assert len(ledger.epochs) == 3
    assert ledger.stopped == "no better validation score for 2 epochs"
    assert ledger.best_epoch == 0


def test_without_validation_the_last_epoch_is_scored(store: Store, tmp_path: Path) -> None:
    """Nothing is chosen by the test windows."""
    ledger = train(program["make_sides"](store, valid=False), tmp_path).ledger
    assert ledger.best_epoch == 2
    assert {score.side for score in ledger.scores} == {"test"}
    assert [line.valid_loss for line in ledger.epochs] == [None] * 3


def test_early_stopping_without_validation_is_refused(store: Store, tmp_path: Path) -> None:
    """Training windows do not decide when to stop."""
    with pytest.raises(InputError, match="patience=3 needs validation windows"):
        train(program["make_sides"](store, valid=False), tmp_path, patience=3)


def test_classes_are_predicted_with_probabilities(store: Store, tmp_path: Path) -> None:
    """One column per class, which add up to one; the prediction is the likeliest."""
    sides = program["make_sides"](store, RecordingColumn("group", "classification"))
    fitted = train(sides, tmp_path)
    table = pq.read_table(tmp_path / "predictions.parquet").to_pandas()
    assert fitted.ledger.classes == ("old", "young")
    np.testing.assert_allclose(table["p_old"] + table["p_young"], 1, rtol=1e-6)
    assert (table["prediction"] == np.where(table["p_old"] > table["p_young"], "old", "young")).all()
    assert {score.metric for score in fitted.ledger.scores} >= {"balanced_accuracy"}


def test_windows_that_teach_nothing_are_refused(store: Store, tmp_path: Path) -> None:
    """Windows that were not split, have no target, or are all of one class: before anything is written."""
    windows = store.windows(FixedWindows(signal="eeg", window_size_s=1.0))
    halves = Split(test=Side(fraction=0.25))
    network = nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"windows\.split"):
        fit(network, windows, tmp_path / "training")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="have no target"):
        fit(network, windows.split(halves), tmp_path / "training")
    one = windows.with_targets([0] * len(windows), ("square", "rt"))
    with pytest.raises(InputError, match="are of the class 'square'"):
        fit(network, one.split(halves), tmp_path / "training")
    assert not (tmp_path / "training").exists()


def test_a_training_is_shown_in_one_line(sides: SplitWindows, tmp_path: Path) -> None:
    """What a notebook shows of a training is where it is and how it ended, not its whole ledger."""
    fitted = train(sides, tmp_path / "training", epochs=1, **CPU)
    assert repr(fitted) == f"Fitted('{tmp_path / 'training'}': all 1 epochs done)"


def test_a_metric_of_the_other_task_is_refused_before_anything_is_written(
    sides: SplitWindows, tmp_path: Path
) -> None:
    """Not after the first epoch."""
    with pytest.raises(InputError, match="accuracy"):
        train(sides, tmp_path / "training", metrics=("accuracy",))
    assert not (tmp_path / "training").exists()


# ---------------------------------------------------------------- other kinds of windows


class Dots(nn.Module):
    """Predicts spike counts of 5 units by the light of the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map frames (window, time, height, width) to counts (window, unit, time)."""
        level = x.mean((1, 2, 3)) / 128
        return (self.gain * level)[:, None, None].expand(-1, 5, 1)


def spikes(path: Path, n_units: tuple[int, ...]) -> Windows:
    """Windows of 4 frames beside one bin of spike counts, one recording per number of units."""
    rng = np.random.default_rng(1)
    recordings = {}
    for number, n in enumerate(n_units):
        frames = engram.ArraySignal(rng.integers(0, 255, (240, 3, 3), dtype=np.uint8), 240.0)
        counts = engram.ArraySignal(rng.integers(0, 4, (120, n), dtype=np.int16), 120.0)
        recordings[f"r{number}"] = engram.ArrayRecording(
            {"stim": frames, "robs": counts}, fields={"subject": f"s{number}"}
        )
    store = engram.prepare(engram.ArraySource(recordings), path).store
    spec = FixedWindows(
        signal="stim",
        window_size_samples=4,
        beside=(Span(signal="robs", window_size_samples=1),),
    )
    return store.windows(spec, SignalTarget("robs"), same_form=False)


def test_a_signal_is_predicted_from_another(tmp_path: Path) -> None:
    """Frames as integers in, one column per unit out."""
    windows = spikes(tmp_path / "store", (5, 5, 5))
    sides = windows.split(Split(test=Side(values=("s1",)), valid=Side(values=("s2",))))
    fitted = fit(Dots(), sides, tmp_path / "training", FitSettings(epochs=1, **CPU))
    table = pq.read_table(tmp_path / "training" / "predictions.parquet")
    assert {"target", "target_4", "prediction_4"} <= set(table.column_names)
    assert "target_5" not in table.column_names
    assert table.num_rows == len(windows) // 3 * 2
    assert fitted.ledger.notes == ()
    windows.store.close()


def test_sessions_of_different_units_train_one_per_batch(tmp_path: Path) -> None:
    """Each with a readout of its own; every value is then a row of its own, and the ledger says so."""

    class ByRecording(nn.Module):
        def __init__(self, n_units: dict[str, int]) -> None:
            super().__init__()
            self.gains = nn.ParameterDict({name: torch.ones(n) for name, n in n_units.items()})

        def forward(self, x: Tensor, recordings: list[str]) -> Tensor:
            (recording,) = set(recordings)
            gain: Tensor = self.gains[recording]
            return (x.mean((1, 2, 3)) / 128)[:, None, None] * gain[:, None]

    windows = spikes(tmp_path / "store", (5, 7))
    split = Split(test=Side(by="block", fraction=0.2), within_subject=True)
    sides = windows.split(split)
    network = ByRecording({"r0": 5, "r1": 7})
    settings = FitSettings(epochs=2, mode="groups", by="recording", **CPU)
    fitted = fit(network, sides, tmp_path / "training", settings)
    assert sides.test is not None
    values = [{"r0": 5, "r1": 7}[row] for row in sides.test.table()["recording"].to_pylist()]
    table = pq.read_table(tmp_path / "training" / "predictions.parquet")
    assert table.num_rows == sum(values)
    assert "one row per value" in fitted.ledger.notes[0]
    assert fitted.ledger.within_subject
    assert all(not torch.equal(gain, torch.ones_like(gain)) for gain in network.gains.values())
    windows.store.close()


def test_sessions_of_other_units_than_those_of_training_are_scored(tmp_path: Path) -> None:
    """Their chance level is the mean over all units."""

    class AnyUnits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, recordings: list[str]) -> Tensor:
            n_units = {"r0": 5, "r1": 7}[recordings[0]]
            return (self.gain * x.mean((1, 2, 3)) / 128)[:, None, None].expand(-1, n_units, 1)

    windows = spikes(tmp_path / "store", (5, 7))
    sides = windows.split(Split(test=Side(values=("s1",))))
    settings = FitSettings(epochs=1, mode="groups", by="recording", **CPU)
    fitted = fit(AnyUnits(), sides, tmp_path / "training", settings)
    assert {score.side for score in fitted.ledger.scores} == {"test"}
    assert all(np.isfinite(score.chance) for score in fitted.ledger.scores)
    windows.store.close()


def test_sentences_of_any_length_are_trained_with_their_lengths(tmp_path: Path) -> None:
    """The model is given what was measured of each window."""
    rng = np.random.default_rng(2)
    recordings = {
        f"r{number}": engram.ArrayRecording(
            {"eeg": engram.ArraySignal(rng.normal(0, 5, (20 + 7 * number, 3)).astype("float32"), 100.0)},
            fields={"subject": f"s{number}", "age": float(number)},
        )
        for number in range(12)
    }
    store = engram.prepare(engram.ArraySource(recordings), tmp_path / "store").store

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.readout = nn.Linear(3, 1)
            self.seen: set[int] = set()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            self.seen |= set(lengths.tolist())
            assert x.shape[2] == int(lengths.max())
            out: Tensor = self.readout(x.sum(2) / lengths[:, None])
            return out

    windows = store.windows(FixedWindows(signal="eeg"), RecordingColumn("age"))
    sides = windows.split(Split(test=Side(values=("s10", "s11"))))
    network = Mean()
    fit(
        network,
        sides,
        tmp_path / "training",
        FitSettings(epochs=1, accelerator="cpu", batch_size=4, mode="lengths"),
    )
    assert len(network.seen) >= 10
    store.close()


# ---------------------------------------------------------------- stops


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_stops_after_the_step_with_a_checkpoint(
    sides: SplitWindows, tmp_path: Path, number: signal.Signals, raised: type[BaseException]
) -> None:
    """Handlers are as before, and the resumed training ends as an unbroken one."""
    train(sides, tmp_path / "whole", accumulate=2)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(progress: Progress) -> None:
        if (progress.epoch, progress.batch, progress.message) == (1, 2, ""):
            os.kill(os.getpid(), number)

    settings = FitSettings(epochs=3, accumulate=2, learning_rate=1e-2, **CPU)
    with pytest.raises(raised) as caught:
        fit(program["Network"](), sides, tmp_path / "parts", settings, progress=interrupt)
    if number is signal.SIGTERM:
        assert caught.value.code == 143  # type: ignore[attr-defined] # SystemExit has one
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    content = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["cursor"]["epoch"] == 1
    assert content["cursor"]["n_batches"] == 2
    train(sides, tmp_path / "parts", accumulate=2)
    for key, weight in program["weights"](tmp_path / "whole").items():
        assert torch.equal(weight, program["weights"](tmp_path / "parts")[key])


def test_a_second_interrupt_stops_at_once_and_loses_only_what_follows_the_checkpoint(
    sides: SplitWindows, tmp_path: Path
) -> None:
    """Also as KeyboardInterrupt, where Lightning alone would end the process."""

    def interrupt(progress: Progress) -> None:
        if (progress.epoch, progress.batch, progress.message) == (1, 3, ""):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(program["Network"](), sides, tmp_path, FitSettings(epochs=3, **CPU), progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before


def scripted(monkeypatch: pytest.MonkeyPatch, readings: Iterator[int]) -> None:
    """Let trainings read these figures of memory, under a limit of 1000 bytes, and none from a thread."""
    limit = Limit("cgroup v2", allowed_bytes=1000, used_bytes=0, where="memory.max")
    last = 0

    def read() -> Usage:
        nonlocal last
        last = next(readings, last)
        return Usage(last, 1, "RSS")

    watch = functools.partial(MemoryWatch, limit=limit, bound=read, read=lambda: Usage(last, 1, "PSS"))
    monkeypatch.setattr(fit_module, "MemoryWatch", watch)
    monkeypatch.setattr(watch_module, "watch_peak", functools.partial(watch_peak, 3600.0))


def test_memory_near_its_limit_stops_after_the_step_with_a_checkpoint(
    sides: SplitWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With figures and a remedy; with more memory, the training ends as an unbroken one."""
    train(sides, tmp_path / "whole")
    with monkeypatch.context() as patch:
        scripted(patch, iter([0, 100, 100, 100, 200, 300, 850]))
        with pytest.raises(MemoryExceeded, match="after optimizer step 3, in epoch 1") as caught:
            train(sides, tmp_path / "parts", memory_every_steps=1)
    assert (caught.value.used_bytes, caught.value.allowed_bytes) == (850, 800)
    train(sides, tmp_path / "parts", memory_every_steps=1)
    for key, weight in program["weights"](tmp_path / "whole").items():
        assert torch.equal(weight, program["weights"](tmp_path / "parts")[key])


def test_a_reading_that_fails_hides_no_other_failure(
    sides: SplitWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is noted on the error that ended the training."""

    def bound() -> Usage:
        if threading.current_thread() is not threading.main_thread():
            raise OSError("no more files")
        return Usage(0, 1, "RSS")

    def fail(progress: Progress) -> None:
        if progress.batch == 1 and not progress.message:
            time.sleep(0.2)
            raise ValueError("the user's own")

    monkeypatch.setattr(fit_module, "MemoryWatch", functools.partial(MemoryWatch, bound=bound))
    with pytest.raises(ValueError, match="the user's own") as caught:
        fit(program["Network"](), sides, tmp_path, FitSettings(epochs=3, **CPU), progress=fail)
    assert any("no more files" in note for note in caught.value.__notes__)


def test_memory_that_is_short_before_the_first_step_stops_before_it(
    sides: SplitWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing PyTorch alone may take more than a small limit allows."""
    with monkeypatch.context() as patch:
        scripted(patch, iter([0, 900]))
        with pytest.raises(MemoryExceeded, match="before it began"):
            train(sides, tmp_path)
    train(sides, tmp_path)


def test_memory_that_is_short_once_the_optimizer_is_there_stops_with_a_checkpoint(
    sides: SplitWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step too, there is something to go on from: the initial weights."""
    with monkeypatch.context() as patch:
        scripted(patch, iter([0, 100, 100, 900]))
        with pytest.raises(MemoryExceeded, match="after optimizer step 0"):
            train(sides, tmp_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_memory_is_watched_in_validation_too(
    sides: SplitWindows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the epoch were saved before it."""
    with monkeypatch.context() as patch:
        scripted(patch, iter([0, *[100] * 8, 900]))  # made, 3 until the start, 5 steps; then validation
        with pytest.raises(MemoryExceeded, match="after optimizer step 5"):
            train(sides, tmp_path, memory_every_steps=1)
    content = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["cursor"]["n_batches"] == 5


def test_a_loss_that_is_not_finite_names_step_and_windows(store: Store, tmp_path: Path) -> None:
    """Through the whole of fit."""
    windows = store.windows(program["SPEC"]).with_targets(np.full(80, 3e38))
    sides = windows.split(Split(test=Side(values=("s7",))))
    with pytest.raises(InputError, match=r"not finite at optimizer step 1 \(epoch 1\), at windows \d+"):
        train(sides, tmp_path)


# ---------------------------------------------------------------- surroundings


def test_a_second_training_in_the_folder_is_refused_while_the_first_goes_on(
    sides: SplitWindows, tmp_path: Path
) -> None:
    """Two would overwrite each other's checkpoints."""
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(InputError, match="Another process trains"):
        train(sides, tmp_path)


def test_a_file_is_no_folder_to_train_in(sides: SplitWindows, tmp_path: Path) -> None:
    """It is left as it is, also where a folder on the way to it is a file."""
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        train(sides, path)
    with pytest.raises(StoreNotWritable, match="Not a directory"):
        train(sides, path / "training")
    assert path.read_text() == "mine"


def test_a_training_changes_nothing_else_in_the_process(sides: SplitWindows, tmp_path: Path) -> None:
    """Random generators go on as if nothing had been trained; no switch of PyTorch stays set."""
    state = get_rng()
    drawn = (random.random(), np.random.normal(), float(torch.rand(())))  # noqa: NPY002 - the global one
    deterministic = torch.are_deterministic_algorithms_enabled()
    model = program["Network"]()
    set_rng(state)
    fit(model, sides, tmp_path, FitSettings(epochs=1, **CPU))
    assert drawn == (random.random(), np.random.normal(), float(torch.rand(())))  # noqa: NPY002 - as above
    assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_the_seed_decides_and_the_process_does_not(sides: SplitWindows, tmp_path: Path) -> None:
    """Whatever was drawn before, the same seed gives the same weights, another one others."""
    train(sides, tmp_path / "a", epochs=1)
    torch.rand(7)
    np.random.uniform(size=3)  # noqa: NPY002 - as above
    train(sides, tmp_path / "b", epochs=1)
    train(sides, tmp_path / "c", epochs=1, seed=1)
    a, b, c = (program["weights"](tmp_path / name)["readout.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_progress_is_told(sides: SplitWindows, tmp_path: Path) -> None:
    """Every step, every epoch with its line, what happened in words."""
    told: list[Progress] = []
    settings = FitSettings(epochs=2, **CPU)
    fit(program["Network"](), sides, tmp_path, settings, progress=told.append)
    assert [p.batch for p in told if p.line is None] == [1, 2, 3, 4, 5] * 2
    assert [p.line.epoch for p in told if p.line is not None] == [0, 1]
    told.clear()
    fit(program["Network"](), sides, tmp_path, settings, progress=told.append)
    (only,) = told
    assert "finished: all 2 epochs done" in only.message


def test_nothing_is_printed(sides: SplitWindows, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only the command line prints; Lightning's advice is kept quiet."""
    train(sides, tmp_path, epochs=1)
    assert capfd.readouterr() == ("", "")
