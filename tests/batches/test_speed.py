"""What is measured of windows, and what is concluded from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram.batches import speed
from engram.batches.loader import Loader
from engram.batches.speed import Speed, SpeedReport, choose_windows, measure_speed
from engram.errors import DoesNotFit, InputError
from engram.preparation.ingest import prepare
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.store.reader import Store
from engram.testing.stores import digest
from engram.windows.spec import FixedWindows, Span

QUICK_S = 0.05

WARM = Speed(
    windows_per_s=90_000.0,
    gb_per_s=9.0,
    disk_gb_per_s=0.0,
    disk_bytes_per_window=0.0,
    n_cores=1.9,
    n_other_cores=0.1,
    n_windows=20_000,
)
CAPPED = Speed(
    windows_per_s=18_000.0,
    gb_per_s=1.8,
    disk_gb_per_s=0.95,
    disk_bytes_per_window=53_000.0,
    n_cores=0.6,
    n_other_cores=0.1,
    n_windows=18_000,
)
REPORT = SpeedReport(
    n_windows=1_000_000,
    batch_size=64,
    stored_bytes_per_window=50_000.0,
    data_bytes=50 * 10**9,
    cache_bytes=12 * 10**9,
    n_cores=2,
    n_threads=2,
    warm=WARM,
    capped=CAPPED,
    memcpy_gb_per_s=12.0,
    memcpy_bytes=256 << 20,
    medium_gb_per_s=1.0,
    medium_read_bytes=53_248,
    is_medium_direct=True,
    is_direct=False,
    read_ahead_kb=128,
)
"""A store that does not fit into memory, on a disk that is kept busy."""

HELD = replace(REPORT, cache_bytes=60 * 10**9)
PROCESSOR = "the processor: reading and decoding"
SLOW = replace(WARM, windows_per_s=20_000.0, gb_per_s=2.0)


@pytest.mark.parametrize(
    ("report", "limit", "advice"),
    [
        (REPORT, "the disk", "More memory helps: windows that it holds come 5.0 times as fast."),
        (replace(REPORT, medium_gb_per_s=2.0), "the loader: it leaves the disk waiting", "threads than 2"),
        (replace(REPORT, warm=SLOW), PROCESSOR, "More cores help;"),
        (replace(REPORT, warm=SLOW, medium_gb_per_s=2.0), PROCESSOR, "cores"),
        (HELD, "memory copying", "Neither more memory nor a faster disk helps"),
        (replace(HELD, warm=SLOW), PROCESSOR, "More cores help;"),
        (replace(HELD, warm=SLOW, n_cores=16), PROCESSOR, "has 2 for 16 cores"),
        (replace(HELD, warm=replace(SLOW, n_cores=1.0)), PROCESSOR, "Larger batches may help;"),
        (
            replace(HELD, warm=replace(SLOW, n_cores=1.0, n_other_cores=0.9)),
            "other programs",
            "They keep 0.9 of 2 cores busy.",
        ),
        (
            replace(REPORT, medium_gb_per_s=2.0, capped=replace(CAPPED, n_other_cores=1.2)),
            "other programs",
            "They keep 1.2 of 2 cores busy.",
        ),
        (replace(REPORT, capped=replace(CAPPED, n_other_cores=1.2)), "the disk", "More memory helps"),
        (replace(HELD, capped=None, medium_gb_per_s=None), "memory copying", "bfloat16"),
        (replace(REPORT, capped=None, medium_gb_per_s=None), "not known", "not known here"),
        (replace(REPORT, medium_gb_per_s=None), "not known", "not known here"),
        (replace(REPORT, n_windows=63 * 64), "not known", "too few windows"),
    ],
)
def test_the_limit_follows_from_the_figures(report: SpeedReport, limit: str, advice: str) -> None:
    """What is near to what is possible is the limit; where memory holds all, the disk is none."""
    assert report.limit == limit
    assert advice in report.advice


def test_fractions_are_of_what_is_possible() -> None:
    """Delivered bytes of what is copied; the disk's bytes for windows of its bytes for random reads."""
    assert REPORT.fraction_of_memcpy == pytest.approx(9 / 12)
    assert REPORT.fraction_of_medium == pytest.approx(0.95)


@pytest.mark.parametrize("per_window", [None, 0.0, 24_000.0])
def test_windows_that_memory_gave_say_nothing_of_the_disk(per_window: float | None) -> None:
    """Where the disk delivered less than half of what was read, no fraction is given, and no limit."""
    report = replace(REPORT, capped=replace(CAPPED, disk_bytes_per_window=per_window))
    assert not report.is_from_medium
    assert report.fraction_of_medium is None
    assert report.limit == "not known"


def test_measuring_gives_figures_that_agree(trials_path: Path) -> None:
    """Rates are above zero and belong together, every round is told, and the store stays as it is."""
    before, told = digest(trials_path), []
    with Store(trials_path) as store:
        windows = choose_windows(store)
        report = measure_speed(
            windows, batch_size=8, seconds=QUICK_S, progress=lambda done, whole: told.append((done, whole))
        )
        batch = windows.read(range(8))

    assert told == [(number, 10) for number in range(1, 11)]
    assert digest(trials_path) == before
    assert (report.n_windows, report.batch_size) == (30, 8)
    assert report.stored_bytes_per_window == 200 * 4 * 2  # float16
    assert report.data_bytes == 30 * 1600
    assert report.capped is not None
    for found in (report.warm, report.capped):
        assert 8 <= found.n_windows <= 30
        assert found.gb_per_s == pytest.approx(found.windows_per_s * batch.n_bytes / 8 / 1e9, rel=0.2)
    assert report.memcpy_gb_per_s > 0
    assert report.limit == "not known"  # 4 batches


def test_capped_windows_come_from_the_disk(trials_path: Path) -> None:
    """The disk delivers at least the bytes of all windows, though they were just read."""
    with Store(trials_path) as store:
        report = measure_speed(choose_windows(store), seconds=QUICK_S)
    assert report.capped is not None
    counted = report.capped.disk_bytes_per_window
    if not counted:
        pytest.skip("stores here lie in memory, or on a file system whose bytes are not counted")
    assert counted >= report.stored_bytes_per_window
    assert report.warm.disk_bytes_per_window == 0
    assert report.fraction_of_medium == pytest.approx(
        (report.capped.disk_gb_per_s or 0) / (report.medium_gb_per_s or 1)
    )


def test_capped_windows_are_read_as_all_windows_would_be(
    trials_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the page cache where that has room for few of all, though the round's own would fit."""
    answers, seen = iter([True]), []
    monkeypatch.setattr("engram.batches.loader._is_cache_useless", lambda *_: next(answers, False))
    read = speed._read

    def note(loader: Loader, *rest: Any) -> Any:
        seen.append(loader.is_direct)
        return read(loader, *rest)

    monkeypatch.setattr(speed, "_read", note)
    with Store(trials_path) as store:
        windows = choose_windows(store)
        if not windows.can_be_read_directly():
            pytest.skip("temporary files cannot be read past the page cache here")
        report = measure_speed(windows, seconds=QUICK_S)
    assert report.is_direct
    assert seen[-5:] == [True] * 5
    assert not any(seen[:-5])
    assert report.capped is not None
    assert report.capped.windows_per_s > 0


def test_bytes_that_nobody_counts_prove_nothing(trials_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system counts no bytes, as in memory, windows are read and nothing is said of the disk."""
    for module in ("engram.batches.speed", "engram.store.medium"):
        monkeypatch.setattr(f"{module}.total_disk_bytes", lambda: None)
    with Store(trials_path) as store:
        report = measure_speed(choose_windows(store), seconds=QUICK_S)
    assert report.capped is not None
    assert report.capped.disk_gb_per_s is None
    assert report.medium_gb_per_s is None
    assert report.fraction_of_medium is None


def test_without_forgetting_there_is_no_capped_figure(
    trials_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system that cannot be asked to forget files measures memory alone."""
    monkeypatch.setattr(speed, "can_forget", lambda: False)
    with Store(trials_path) as store:
        report = measure_speed(choose_windows(store), seconds=QUICK_S)
    assert report.warm.windows_per_s > 0
    assert (report.capped, report.medium_gb_per_s, report.fraction_of_medium) == (None, None, None)


def test_an_interrupt_leaves_nothing_behind(trials_path: Path) -> None:
    """Ctrl-C in any round: no thread and no file stays (the fixture of all tests looks for them)."""
    for last in (1, 6):

        def interrupt(done: int, _: int, last: int = last) -> None:
            if done == last:
                raise KeyboardInterrupt

        with Store(trials_path) as store, pytest.raises(KeyboardInterrupt):
            measure_speed(choose_windows(store), seconds=QUICK_S, progress=interrupt)


def test_batches_shrink_until_they_fit(trials: Store) -> None:
    """A batch that does not fit into memory is halved; what does not fit at all is an error."""
    windows = choose_windows(trials)
    with pytest.raises(DoesNotFit) as refused:
        windows.loader(16, memory=1)
    needed_bytes = refused.value.needed_bytes

    assert measure_speed(windows, batch_size=16, seconds=QUICK_S, memory=needed_bytes - 1).batch_size == 8
    with pytest.raises(DoesNotFit):
        measure_speed(windows, batch_size=16, seconds=QUICK_S, memory=1000)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_no_time_measures_nothing(trials: Store, seconds: float) -> None:
    """Seconds are above zero."""
    with pytest.raises(InputError, match="above zero"):
        measure_speed(choose_windows(trials), seconds=seconds)


def test_the_signal_of_most_bytes_is_chosen(kinds: Store) -> None:
    """Without a name: the signal whose samples, rows of banks included, are most bytes."""
    assert choose_windows(kinds).index.spec.signal == "betas"


@pytest.mark.parametrize(
    ("signal", "stored_bytes"),
    [
        ("stim", 480 * 81),
        ("robs", 240 * 20 * 2),
        ("betas", 2 * 150 * 150 * 100 * 2),
        ("image", 2 * (4 + 32 * 32 * 3)),  # two numbers, and the two rows of the bank
    ],
)
def test_every_kind_of_signal_can_be_measured(kinds: Store, signal: str, stored_bytes: int) -> None:
    """Frames, spike counts, volumes of 9 MB, and rows of a bank, all by windows of two seconds."""
    report = measure_speed(choose_windows(kinds, signal), seconds=QUICK_S)
    assert report.stored_bytes_per_window == stored_bytes
    assert report.warm.windows_per_s > 0


def test_several_signals_are_measured_together(kinds: Store) -> None:
    """Windows of one's own, with signals beside the main one, are measured as they are."""
    spec = FixedWindows(signal="robs", window_size_samples=1, beside=(Span(signal="stim", offset_s=0.0),))
    report = measure_speed(kinds.windows(spec), seconds=QUICK_S)
    assert report.stored_bytes_per_window == pytest.approx(20 * 2 + 2 * 81)


def test_recordings_of_another_form_are_left_out(kinds: Store) -> None:
    """A global shuffle mixes recordings: those of the commonest channels and rate are measured."""
    windows = choose_windows(kinds, "eeg")
    assert windows.n_chans == 8
    assert windows.counts()["other channels"] == 2


def made(tmp_path: Path, rate_hz: float, *n_samples: int) -> Store:
    """Prepare recordings of some lengths."""
    signals = [ArraySignal(np.zeros((n, 2), np.float32), rate_hz) for n in n_samples]
    recordings: dict[str, Any] = {f"r{i}": ArrayRecording({"x": signal}) for i, signal in enumerate(signals)}
    return prepare(ArraySource(recordings), tmp_path / "store").store


@pytest.mark.parametrize(
    ("rate_hz", "n_samples", "length"),
    [
        (100.0, (150, 400, 1000), 200),  # one of three is shorter
        (100.0, (120, 150, 1000), 150),  # two of three are: as long as the middle one
        (0.25, (3, 4, 5), 1),  # four seconds apart
    ],
)
def test_windows_fit_into_the_recordings(
    tmp_path: Path, rate_hz: float, n_samples: tuple[int, ...], length: int
) -> None:
    """Two seconds where half of the recordings have them, else the middle length; a sample at least."""
    with made(tmp_path, rate_hz, *n_samples) as store:
        assert choose_windows(store).n_times == length


def test_what_has_no_windows_is_refused(kinds: Store) -> None:
    """A signal that is not there, and a length of nothing, are refused."""
    with pytest.raises(InputError, match="betas, eeg, image, robs, stim"):
        choose_windows(kinds, "emg")
    for window_s in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="above zero"):
            choose_windows(kinds, "eeg", window_s)
