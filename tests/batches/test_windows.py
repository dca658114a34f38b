"""Windows of a store: reading them as batches, splitting them, and what models ask of them."""

from __future__ import annotations

import pickle
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import engram
from engram.batches.windows import Windows
from engram.errors import InputError, MissingExtra, StoreDamaged
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.store.reader import Store
from engram.testing.kinds import make_arrays
from engram.testing.sparse import SparseCorpus, write_sparse
from engram.windows.cutting import Cutting, Located
from engram.windows.spec import EventWindows, FixedWindows, Span
from engram.windows.splits import Side, Split
from engram.windows.targets import EventColumn, RecordingColumn, SignalTarget

TRIALS = EventWindows(signal="eeg", anchor=("left", "right"), trial_start_offset_s=-0.2, trial_duration_s=0.5)
SORT = EventColumn("description", "classification")
STIMULUS = FixedWindows(
    signal="robs",
    window_size_samples=1,
    start_offset_s=0.25,
    beside=(Span(signal="stim", offset_samples=-32, window_size_samples=33),),
)


def test_the_face_is_a_method_of_the_store(trials: Store) -> None:
    """``engram.open(path).windows(...)`` gives windows that read what ``Store.read`` reads."""
    with engram.open(trials.path) as store:
        windows = store.windows(TRIALS, SORT)
        batch = windows.read(np.array([5, 0]))
        first = store.read("sub-0", "eeg", 80, 130)

    assert isinstance(windows, Windows)
    assert isinstance(batch.X, torch.Tensor)
    assert np.array_equal(batch.X[1].numpy(), first.T)
    assert batch.X.is_contiguous()
    assert batch.numbers.tolist() == [5, 0]
    assert batch.n_global == len(batch) == 2


def test_without_torch_the_extra_is_named(trials: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no torch can open a store, and is told what brings windows."""
    for name in [name for name in sys.modules if name.startswith("engram.batches")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"engram\[torch\]"):
        trials.windows(TRIALS)


def test_targets_have_the_shape_of_what_a_model_gives(trials: Store) -> None:
    """y is (window, 1) float32 for regression, (window,) int64 for classes, None without a target."""
    regression = trials.windows(TRIALS, EventColumn("rt"))
    classes = trials.windows(TRIALS, SORT)
    numbers = np.arange(4)
    rt = [float(text) for text in trials.events["rt"].to_pylist()[:4]]
    sorts = trials.events["description"].to_pylist()[:4]

    y = regression.read(numbers).y
    assert y is not None
    assert y.dtype == torch.float32
    assert y.tolist() == [[np.float32(value)] for value in rt]
    y = classes.read(numbers).y
    assert y is not None
    assert y.dtype == torch.int64
    assert [classes.classes[number] for number in y] == sorts
    assert trials.windows(TRIALS).read(numbers).y is None


def test_a_signal_may_be_the_target(kinds: Store) -> None:
    """Frames in, spike counts out: the target is y, and not among the inputs; integers stay integers."""
    spec = FixedWindows(
        signal="stim", window_size_samples=33, beside=(Span(signal="robs", window_size_samples=1),)
    )
    windows = kinds.windows(spec, SignalTarget("robs"))
    batch = windows.read(np.array([0, 3]))

    arrays = make_arrays()["session-0"]
    assert windows.inputs == ("stim",)
    assert batch.signals.keys() == {"stim"}
    assert batch.lengths.keys() == {"stim", "robs"}
    assert batch.y is not None
    assert batch.y.dtype == torch.int16
    assert isinstance(batch.X, torch.Tensor)
    assert np.array_equal(batch.X[1].numpy(), arrays["stim"][99:132])
    # 99 frames at 240 Hz are 49.5 bins at 120 Hz, and a half goes up.
    assert np.array_equal(batch.y[1].numpy(), arrays["robs"][50:51].T)
    assert windows.n_outputs == 20


def test_several_signals_come_by_name_on_their_own_clocks(kinds: Store) -> None:
    """One bin of spikes at 120 Hz comes with the 33 frames at 240 Hz that end with its start."""
    windows = kinds.windows(STIMULUS, same_form=False)
    batch = windows.read(np.array([7]))

    arrays = make_arrays()["session-0"]
    assert np.array_equal(batch.signals["robs"][0].numpy(), arrays["robs"][37:38].T)
    assert np.array_equal(batch.signals["stim"][0].numpy(), arrays["stim"][74 - 32 : 75])


def test_sessions_of_different_units_come_one_per_batch(kinds: Store) -> None:
    """With ``same_form=False`` and one recording per batch, every batch is of one session's units."""
    windows = kinds.windows(STIMULUS, same_form=False)
    n_units = [batch.signals["robs"].shape[1] for batch in windows.loader(16, mode="groups", by="recording")]

    assert set(n_units) == {20, 21}
    with pytest.raises(InputError, match="cannot share a batch"):
        windows.read(np.arange(len(windows)))
    with pytest.raises(InputError, match="differ in 'robs': 20 channels, int16; 21 channels"):
        _ = windows.n_chans


def test_sentences_are_padded_and_their_lengths_told(kinds: Store) -> None:
    """Windows of whole recordings are as long as each; zeros follow, and lengths are the true ones."""
    windows = kinds.windows(FixedWindows(signal="eeg", where={"subject": ("sentence-0", "sentence-1")}))
    batch = windows.read(np.array([0, 1]))

    assert isinstance(batch.X, torch.Tensor)
    assert batch.X.shape == (2, 8, 700)
    assert batch.lengths["eeg"].tolist() == [700, 1]
    assert not batch.X[1, :, 1:].any()
    with pytest.raises(InputError, match=r"1 to 700 samples\. Give window_size_s"):
        _ = windows.n_times


def test_no_windows_give_tensors_of_no_rows(trials: Store) -> None:
    """A rank without rows gets tensors of the usual form."""
    batch = trials.windows(TRIALS, SORT).read([])

    assert isinstance(batch.X, torch.Tensor)
    assert batch.y is not None
    assert batch.X.shape == (0, 4, 50)
    assert (batch.X.dtype, batch.y.dtype) == (torch.float32, torch.int64)
    assert len(batch) == batch.n_global == 0
    windows = trials.windows(TRIALS, SORT)
    empty = windows.fill(windows.find([], dtype="bfloat16", n_global=7))
    assert (empty.signals["eeg"].dtype, empty.signals["eeg"].shape) == (torch.bfloat16, (0, 4, 50))
    assert empty.n_global == 7


@pytest.mark.parametrize("numbers", [[-1], [10_000], [[0, 1]], 3, [0.5], [True, False]])
def test_windows_that_there_are_not_are_refused(trials: Store, numbers: Any) -> None:
    """Numbers outside the index, or not in a row, are an InputError."""
    with pytest.raises(InputError):
        trials.windows(TRIALS).read(numbers)


def test_models_are_told_what_braindecode_calls_them(trials: Store) -> None:
    """n_chans, n_times, sfreq, ch_names and n_outputs are those of the windows."""
    windows = trials.windows(TRIALS, SORT)

    assert (windows.n_chans, windows.n_times, windows.sfreq, windows.n_outputs) == (4, 50, 100.0, 2)
    assert windows.ch_names == ("E1", "E2", "E3", "E4")
    assert trials.windows(TRIALS, RecordingColumn("age")).n_outputs == 1
    with pytest.raises(InputError, match="no target"):
        _ = trials.windows(TRIALS).n_outputs


def test_images_have_no_channels(kinds: Store) -> None:
    """A model of channels is not told a number for samples that are frames."""
    windows = kinds.windows(
        FixedWindows(signal="stim", window_size_samples=10, where={"subject": ("session-0",)})
    )
    with pytest.raises(InputError, match=r"'stim' has shape \(9, 9\) and no channels"):
        _ = windows.n_chans


def test_own_targets_are_read_with_their_windows(trials: Store) -> None:
    """Targets that the user has computed take the place of the store's."""
    windows = trials.windows(TRIALS)
    y = windows.with_targets(np.arange(len(windows)) / 2).read([3, 1]).y
    assert y is not None
    assert y.tolist() == [[1.5], [0.5]]


def test_sides_are_windows_of_the_same_store(trials: Store) -> None:
    """A split gives windows per side, of distinct subjects, that read from the one store."""
    windows = trials.windows(TRIALS, SORT)
    sides = windows.split(Split(test=Side(values=("S2",)), valid=Side(values=("S1",))))

    assert list(sides) == ["train", "valid", "test"]
    assert sum(len(side) for side in sides.values()) + sum(sides.unused.values()) == len(windows)
    assert sides.n_subjects == {"train": 1, "valid": 1, "test": 1}
    assert not sides.within_subject
    test = sides["test"]
    assert {row["subject"] for row in test.table().to_pylist()} == {"S2"}
    assert torch.equal(test.read([0]).signals["eeg"], windows.read([2 * len(windows) // 3]).signals["eeg"])
    with pytest.raises(KeyError):
        sides["extra"]
    assert list(windows.split(Split(test=Side(fraction=0.3)))) == ["train", "test"]


def test_windows_travel(trials: Store) -> None:
    """Pickled windows read the same in the process that they went to."""
    windows = trials.windows(TRIALS, SORT)
    travelled = pickle.loads(pickle.dumps(windows))

    assert torch.equal(travelled.read([4]).X, windows.read([4]).signals["eeg"])
    assert travelled.index.fingerprint == windows.index.fingerprint
    travelled.store.close()


def test_a_batch_takes_no_more_than_is_said(kinds: Store) -> None:
    """The prediction for the longest windows, of four precisions in one batch, holds while it is read."""
    whole = FixedWindows(signal="eeg", where={"subject": tuple(f"sentence-{i}" for i in range(7))})
    windows = kinds.windows(whole)
    windows.read(np.arange(7))
    predicted_bytes = windows.batch_bytes(7)

    tracemalloc.start()
    batch = windows.read(np.arange(7))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    n_bytes = batch.signals["eeg"].nbytes
    assert n_bytes <= predicted_bytes < n_bytes + 64
    assert peak_bytes <= predicted_bytes + windows.scratch_bytes() + 16 * 1024


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("numbers", [[0], [4, 2, 5], list(range(7))])
def test_a_batch_is_filled_into_the_caller_s_memory(kinds: Store, numbers: list[int], dtype: Any) -> None:
    """Of no more than the bytes predicted, each signal from a cache line on; it is what is read without."""
    sentences = FixedWindows(signal="eeg", where={"subject": tuple(f"sentence-{i}" for i in range(7))})
    session = FixedWindows(signal="robs", window_size_samples=3, beside=STIMULUS.beside, start_offset_s=0.25)
    for windows in (kinds.windows(sentences), kinds.windows(session, SignalTarget("robs"))):
        n_bytes = windows.batch_bytes(len(numbers), dtype)
        memory = np.full(n_bytes + 64, 0xAA, np.uint8)
        told: list[Any] = []
        reads = windows.find(numbers, dtype=dtype)
        batch = windows.fill(reads, memory[:n_bytes], progress=told.append)

        assert told == list(reads.ranges)
        assert (memory[n_bytes:] == 0xAA).all()
        same = windows.read(numbers)
        begins = [*(x.data_ptr() for x in batch.signals.values())]
        for name, x in batch.signals.items():
            expected = same.signals[name]
            assert torch.equal(x, expected if dtype is None else expected.to(getattr(torch, dtype)))
        if windows.target_signal is not None:
            assert batch.y is not None
            assert torch.equal(batch.y, same.y)  # type: ignore[arg-type]  # a tensor
            begins.append(batch.y.data_ptr())
        assert min(begins) == memory.ctypes.data
        assert all((begin - memory.ctypes.data) % 64 == 0 for begin in begins)


def test_finding_reads_no_samples(trials_path: Path, tmp_path: Path) -> None:
    """What a batch takes is known from tables; only filling it opens the files."""
    shutil.copytree(trials_path, tmp_path / "store")
    with engram.open(tmp_path / "store") as store:
        windows = store.windows(TRIALS)
        (tmp_path / "store" / store.extent("sub-0", "eeg").part.file).unlink()
        reads = windows.find([3, 1])
        assert reads.numbers.tolist() == [3, 1]
        assert sum(ranges.n_bytes for ranges in reads.ranges) == 2 * 50 * 4 * 2  # float16
        with pytest.raises(StoreDamaged, match="is missing"):
            windows.fill(reads)


def test_checking_takes_a_block_of_memory(kinds: Store, trials: Store) -> None:
    """One after another: a thread holds the block, or its buffers, whichever is more."""
    windows = trials.windows(TRIALS)
    block_bytes = trials.extent("sub-0", "eeg").part.grid.block_bytes
    assert windows.scratch_bytes(is_checked=True) == block_bytes > windows.scratch_bytes() > 0
    volumes = kinds.windows(FixedWindows(signal="betas", window_size_samples=1))
    assert volumes.scratch_bytes(is_checked=True) >= 2 * 150 * 150 * 100


def test_recordings_may_show_one_or_several_images_at_once(tmp_path: Path) -> None:
    """Of one bank, in any order of recordings: memory is enough for the larger samples."""
    rng = np.random.default_rng(0)
    bank = rng.integers(0, 255, (5, 8, 8), dtype=np.uint8)
    shown = {"a": rng.integers(0, 5, (6, 2), np.int32), "b": rng.integers(0, 5, 6, np.int32)}
    recordings = {
        name: ArrayRecording({"image": ArraySignal(numbers, 1.0, bank="images")})
        for name, numbers in shown.items()
    }
    with engram.prepare(ArraySource(recordings, {"images": bank}), tmp_path / "store").store as store:
        windows = store.windows(FixedWindows(signal="image", window_size_samples=1), same_form=False)
        for batch in windows.loader(3, mode="groups", by="recording", drop_last=False):
            name = "a" if batch.numbers[0] < 6 else "b"
            expected = bank[shown[name][batch.numbers.numpy() % 6]][:, None]
            assert np.array_equal(batch.signals["image"].numpy(), expected)


def test_scales_of_int16_are_counted(kinds: Store, trials: Store) -> None:
    """Where values are read with them, those of all recordings; where none is, nothing is read."""
    windows = kinds.windows(FixedWindows(signal="eeg", where={"subject": ("sentence-0", "sentence-3")}))
    of_channel, objects = 8 + 8, 1000  # a scale and an offset; what Python holds of two arrays
    assert windows.scales_bytes == 2 * (8 * of_channel + objects)  # the store has two recordings of int16
    assert trials.windows(TRIALS).scales_bytes == 0


def test_ten_million_windows_are_not_walked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a first batch of 100 GB, two windows of every recording are placed, and what is looked up ahead."""
    write_sparse(tmp_path / "store", SparseCorpus())
    placed, lay = [], Cutting.lay

    def counting(cutting: Cutting, origin: NDArray[np.int32], i_window: NDArray[np.int64]) -> Located:
        placed.append(len(origin))
        return lay(cutting, origin, i_window)

    monkeypatch.setattr(Cutting, "lay", counting)
    with engram.open(tmp_path / "store") as store:
        windows = store.windows(
            FixedWindows(signal="eeg", window_size_s=2.0, window_stride_samples=38, drop_last_window=False)
        )
        assert len(windows) > 10_000_000
        assert windows.n_times == 200
        loader = windows.loader(64, mode="shuffled", memory="500 MB", threads=1)
        passing = iter(loader)
        assert len(next(passing)) == 64
        del passing

    n_looked_at = 2 * 512  # for what neighbours share
    assert sum(placed) <= 2 * 2000 + n_looked_at + 64 * loader.sizes.n_found


def test_a_mode_needs_its_column(trials: Store) -> None:
    """``by`` is for grouping: missing where it is needed, or given where it does nothing, is an error."""
    windows = trials.windows(TRIALS)
    with pytest.raises(InputError):
        windows.order(8, mode="groups")
    with pytest.raises(InputError):
        windows.order(8, mode="shuffled", by="subject")
    with pytest.raises(InputError, match="subject"):
        windows.order(8, mode="groups", by="no such column")


def test_order_by_length_and_balance_know_the_windows(kinds: Store, trials: Store) -> None:
    """Mode ``lengths`` sees true lengths, and ``balanced`` the values of a column."""
    whole = kinds.windows(FixedWindows(signal="eeg"), same_form=True)
    order = whole.order(2, mode="lengths", drop_last=False)
    spread = [
        np.ptp(whole.index.locate(order.batch(0, number)).lengths["eeg"]) for number in range(order.n_batches)
    ]
    assert len(whole) == 7
    assert max(spread) < 2196

    windows = trials.windows(TRIALS)
    order = windows.order(8, mode="balanced", by="description", drop_last=False)
    drawn = np.concatenate([order.batch(0, number) for number in range(order.n_batches)])
    codes = windows.index.column("description").codes[drawn]
    assert abs(np.mean(codes) - 0.5) <= 1 / len(drawn)


def test_recordings_of_other_rates_have_no_one_rate(tmp_path: Any) -> None:
    """sfreq is an error where windows are of several rates."""
    recordings = {
        f"at-{rate}": ArrayRecording({"eeg": ArraySignal(np.zeros((rate, 2), "float32"), float(rate))})
        for rate in (100, 250)
    }
    with engram.prepare(ArraySource(recordings), tmp_path / "store").store as store:
        windows = store.windows(FixedWindows(signal="eeg", window_size_samples=50), same_form=False)
        with pytest.raises(InputError, match="100, 250 Hz"):
            _ = windows.sfreq


def test_some_windows_may_be_taken(trials: Store) -> None:
    """They are numbered anew, and read as before."""
    windows = trials.windows(FixedWindows(signal="eeg", window_size_s=1.0))
    keep = np.arange(len(windows)) % 3 == 1
    taken = windows.take(keep)
    nothing = windows.take(np.zeros(len(windows), bool))
    for use in (lambda: nothing.read([]), lambda: nothing.loader(4)):
        with pytest.raises(InputError, match="There are no windows"):
            use()
    assert len(taken) == keep.sum()
    assert torch.equal(taken.read([0, 1]).signals["eeg"], windows.read([1, 4]).signals["eeg"])
