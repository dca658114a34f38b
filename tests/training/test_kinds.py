"""Recordings of every kind train through the same face, and leave what any training leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import engram
from engram.batches.windows import SplitWindows
from engram.ledger import PREDICTIONS, Ledger
from engram.report.page import write_report
from engram.store.reader import Store
from engram.testing.kinds import Arrays, make_arrays, make_source
from engram.training.fit import Fitted
from engram.training.settings import FitSettings
from engram.windows import FixedWindows, Span
from engram.windows.splits import Side, Split
from engram.windows.targets import SignalTarget


@pytest.fixture
def prepared(tmp_path: Path) -> Iterator[Callable[[Arrays], Store]]:
    """Prepare arrays, and close their stores after the test."""
    stores = []

    def prepare(arrays: Arrays) -> Store:
        stores.append(engram.prepare(make_source(arrays), tmp_path / "store").store)
        return stores[-1]

    yield prepare
    for store in stores:
        store.close()


def fit_and_show(model: nn.Module, sides: SplitWindows, folder: Path, **settings: Any) -> Fitted:
    """Train a few steps; look at what every training leaves: ledger, predictions, page."""
    fitted = engram.fit(model, sides, folder / "training", FitSettings(accelerator="cpu", **settings))
    assert Ledger.read(fitted.folder) == fitted.ledger
    assert np.isfinite([line.train_loss for line in fitted.ledger.epochs]).all()
    assert {score.side for score in fitted.ledger.scores} == {"test"}
    assert np.isfinite([(score.value, score.chance) for score in fitted.ledger.scores]).all()
    assert write_report([fitted.folder], folder / "report.html").stat().st_size > 10_000
    return fitted


# ---------------------------------------------------------------- frames and spikes

N_LAGS = 33


class SharedCore(nn.Module):
    """Predicts spike counts: filters over lags and pixels that all sessions share, a readout for each."""

    def __init__(self, n_units: dict[str, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.Conv3d(1, 4, (N_LAGS, 3, 3))
        self.readouts = nn.ModuleDict({name: nn.Linear(4 * 7 * 7, n) for name, n in n_units.items()})
        self.batches: list[set[str]] = []

    def forward(self, X: Tensor, recordings: list[str]) -> Tensor:  # noqa: N803 - scikit-learn's word
        """Map frames (window, lag, height, width) of one session to counts (window, unit, 1)."""
        assert X.shape[1:] == (N_LAGS, 9, 9)
        self.batches.append(set(recordings))
        hidden = self.core(X[:, None] / 255).relu().flatten(1)
        counts: Tensor = self.readouts[recordings[0]](hidden)
        return counts[:, :, None]


def test_frames_with_lags_predict_the_spikes_of_sessions_with_their_own_units(
    prepared: Callable[[Arrays], Store], tmp_path: Path
) -> None:
    """Frames at 240 Hz with lags 0 to 32 before each bin at 120 Hz; one session in a batch."""
    arrays = {key: signals for key, signals in make_arrays().items() if "robs" in signals}
    windows = prepared(arrays).windows(
        FixedWindows(
            signal="stim",
            window_size_samples=N_LAGS,
            window_stride_samples=2,  # frames in a bin
            beside=(Span(signal="robs", offset_samples=(N_LAGS - 1) // 2, window_size_samples=1),),
        ),
        SignalTarget("robs"),
        same_form=False,
    )
    n_units = {key: signals["robs"].shape[1] for key, signals in arrays.items()}
    assert n_units == {"session-0": 20, "session-1": 21}
    # Of 240 bins, the first 16 do not have 32 frames before them.
    assert len(windows) == 2 * (240 - 16)
    batch = windows.read([5])
    number = 5 + 16
    np.testing.assert_array_equal(
        batch.signals["stim"][0], arrays["session-0"]["stim"][2 * number - 32 : 2 * number + 1]
    )
    assert batch.y is not None
    np.testing.assert_array_equal(batch.y[0, :, 0], arrays["session-0"]["robs"][number])

    sides = windows.split(Split(test=Side(by="block", fraction=0.2), within_subject=True, gap_s=0.1))
    model = SharedCore(n_units)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fitted = fit_and_show(model, sides, tmp_path, epochs=2, batch_size=16, mode="groups", by="recording")

    assert all(len(sessions) == 1 for sessions in model.batches)
    assert all(not torch.equal(before[key], value) for key, value in fitted.model.state_dict().items())
    assert fitted.ledger.within_subject
    assert sides.test is not None
    n_values = [n_units[recording] for recording in sides.test.table()["recording"].to_pylist()]
    assert pq.read_metadata(fitted.folder / PREDICTIONS).num_rows == sum(n_values)


# ---------------------------------------------------------------- sentences


class Listener(nn.Module):
    """Reads sentences of any length with a recurrent network, packed by their lengths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = nn.GRU(8, 12, batch_first=True)
        self.readout = nn.Linear(12, 2)

    def forward(self, X: Tensor, lengths: Tensor) -> Tensor:  # noqa: N803 - scikit-learn's word
        """Map (window, channel, time) to (window, class)."""
        packed = nn.utils.rnn.pack_padded_sequence(
            X.transpose(1, 2), lengths, batch_first=True, enforce_sorted=False
        )
        _, last = self.recurrent(packed)
        scores: Tensor = self.readout(last[0])
        return scores


def test_sentences_of_any_length_are_classified_by_a_network_that_takes_lengths(
    prepared: Callable[[Arrays], Store], tmp_path: Path
) -> None:
    """Whole recordings are windows; batches are of like lengths, classes are the user's own."""
    rng = np.random.default_rng(3)
    lengths = rng.permutation(np.geomspace(20, 400, 48).astype(int))
    is_loud = np.arange(48) % 2
    windows = prepared(
        {
            f"sentence-{i:02}": {"eeg": rng.normal(0, 1 + 9 * is_loud[i], (length, 8))}
            for i, length in enumerate(lengths.tolist())
        }
    ).windows(FixedWindows(signal="eeg"))
    assert windows.index.locate(np.arange(48)).lengths["eeg"].tolist() == lengths.tolist()

    tested = tuple(f"sentence-{i:02}" for i in range(36, 48))
    sides = windows.with_targets(is_loud, ("quiet", "loud")).split(Split(test=Side(values=tested)))
    model = Listener()
    fitted = fit_and_show(model, sides, tmp_path, epochs=4, batch_size=6, mode="lengths", learning_rate=1e-2)

    table = pq.read_table(fitted.folder / PREDICTIONS)
    assert table["recording"].to_pylist() == list(tested)
    assert table["target"].to_pylist() == ["quiet", "loud"] * 6
    assert {"p_quiet", "p_loud"} <= set(table.column_names)
    (accuracy,) = (score for score in fitted.ledger.scores if score.metric == "balanced_accuracy")
    assert accuracy.value > accuracy.chance == 0.5


# ---------------------------------------------------------------- volumes

VOLUME = (150, 150, 100)


def volumes(n_subjects: int) -> Arrays:
    """Three volumes of 9 MB in float32 for each subject, and the images that were seen."""
    drawn = make_arrays()["volumes"]
    return {
        f"volumes-{i}": {"betas": drawn["betas"] + np.int16(i), "image": drawn["image"]}
        for i in range(n_subjects)
    }


class Pooled(nn.Module):
    """Means of blocks of voxels, read out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.readout = nn.Linear(6 * 6 * 4, 1)

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - scikit-learn's word
        """Map (window, 1, x, y, z) to (window, 1)."""
        assert X.shape[1:] == (1, *VOLUME)
        number: Tensor = self.readout(nn.functional.avg_pool3d(X, 25).flatten(1))
        return number


def test_volumes_of_9_mb_predict_a_number(prepared: Callable[[Arrays], Store], tmp_path: Path) -> None:
    """Stored integers reach the network as float32; the target is a figure of the user's per volume."""
    windows = prepared(volumes(4)).windows(FixedWindows(signal="betas", window_size_samples=1))
    assert windows.batch_bytes(1) == pytest.approx(2 * 2_250_000, rel=0.01)  # as the integers they are
    sides = windows.with_targets(np.tile([0.0, 1.0, 2.0], 4)).split(Split(test=Side(values=("volumes-3",))))

    fitted = fit_and_show(Pooled(), sides, tmp_path, epochs=2, batch_size=3)

    table = pq.read_table(fitted.folder / PREDICTIONS)
    assert table["target"].to_pylist() == [0.0, 1.0, 2.0]
    assert [line.n_windows for line in fitted.ledger.sides] == [9, 3]


class Painter(nn.Module):
    """Predicts every voxel from the image's brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(VOLUME))

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803 - scikit-learn's word
        """Map images (window, 1, height, width, color) to (window, 1, x, y, z)."""
        assert X.shape[1:] == (1, 32, 32, 3)
        brightness = X.mean((1, 2, 3, 4)) / 128
        return brightness[:, None, None, None, None] * self.gains


def test_volumes_of_9_mb_are_predicted_from_images(
    prepared: Callable[[Arrays], Store], tmp_path: Path
) -> None:
    """Images come from the bank by their numbers; of two million voxels a window, a part is kept."""
    windows = prepared(volumes(3)).windows(
        FixedWindows(
            signal="image", window_size_samples=1, beside=(Span(signal="betas", window_size_samples=1),)
        ),
        SignalTarget("betas"),
    )
    sides = windows.split(Split(test=Side(values=("volumes-2",))))

    fitted = fit_and_show(Painter(), sides, tmp_path, epochs=1, batch_size=3, learning_rate=0.1)

    assert fitted.ledger.notes[0] == "test: scored on every 4th value of the target signal."
    n_rows = pq.read_metadata(fitted.folder / PREDICTIONS).num_rows
    assert n_rows == pytest.approx(3 * np.prod(VOLUME) / 4, abs=3)
