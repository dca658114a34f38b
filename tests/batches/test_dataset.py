"""Windows as datasets of PyTorch, skorch and braindecode."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from engram.batches.batch import Batch
from engram.batches.windows import Windows
from engram.errors import InputError
from engram.store.reader import Store
from engram.windows.spec import EventWindows, FixedWindows, Span
from engram.windows.targets import EventColumn, SignalTarget

TRIALS = EventWindows(
    signal="eeg", anchor=("left", "right"), trial_duration_s=0.8, window_size_s=0.4, window_stride_s=0.2
)
SORT = EventColumn("description", "classification")

forks = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"  # fork is the point
)


@pytest.fixture
def windows(trials: Store) -> Windows:
    """Three windows in each of 54 trials, to be told apart by their sort of event."""
    return trials.windows(TRIALS, SORT)


def test_an_item_is_braindecode_s(windows: Windows) -> None:
    """X float32 (channel, time), y an int, and where the window lies within trial and recording."""
    X, y, place = windows.dataset()[4]  # noqa: N806 - braindecode's word

    assert isinstance(X, np.ndarray)
    assert (X.dtype, X.shape) == (np.dtype("float32"), (4, 40))
    assert np.array_equal(X, windows.store.read("sub-0", "eeg", 220, 260).T)
    assert type(y) is int
    assert windows.classes[y] == windows.store.events["description"][1].as_py()
    assert place == [1, 220, 260]
    assert [type(number) for number in place] == [int, int, int]


def test_items_and_batches_of_braindecode_have_the_same_types(windows: Windows) -> None:
    """Collated by ``DataLoader``, windows are what braindecode's own dataset of the same trials gives."""
    mne = pytest.importorskip("mne")
    braindecode = pytest.importorskip("braindecode.datasets")
    preprocessing = pytest.importorskip("braindecode.preprocessing")
    store = windows.store
    raw = mne.io.RawArray(
        store.read("sub-0", "eeg").T.astype(float), mne.create_info(4, 100.0, "eeg"), verbose="error"
    )
    events = [row for row in store.events.to_pylist() if row["recording"] == "sub-0"]
    onsets, texts = [row["onset_s"] for row in events], [row["description"] for row in events]
    raw.set_annotations(mne.Annotations(onsets, [0.8] * len(onsets), texts))
    theirs = preprocessing.create_windows_from_events(
        braindecode.BaseConcatDataset([braindecode.RawDataset(raw)]),
        window_size_samples=40,
        window_stride_samples=20,
        on_last_window="drop",
        mapping={"left": 0, "right": 1},
    )
    ours = windows.dataset()
    own, other = (next(iter(DataLoader(dataset, batch_size=len(theirs)))) for dataset in (ours, theirs))

    assert torch.equal(own[0], other[0])
    assert torch.equal(own[1], other[1])
    assert own[0].dtype == other[0].dtype
    assert own[1].dtype == other[1].dtype
    assert type(own[2]) is type(other[2])
    assert all(torch.equal(a, b) for a, b in zip(own[2], other[2], strict=True))


def test_items_are_counted_as_a_list_s(windows: Windows) -> None:
    """Negative numbers count from the end, the end is an IndexError, and a loop ends."""
    dataset: Any = windows.dataset()

    assert len(dataset) == len(windows) == 162
    assert np.array_equal(dataset[-1][0], dataset[161][0])
    assert len(list(dataset)) == 162
    for number in (162, -163):
        with pytest.raises(IndexError):
            dataset[number]
    with pytest.raises(TypeError):
        dataset[1.7]
    with pytest.raises(InputError):
        dataset.__getitems__([1.5])


def test_many_items_are_the_single_ones(windows: Windows) -> None:
    """``__getitems__`` gives, in the order asked for and also twice, what ``[]`` gives."""
    dataset = windows.dataset()
    numbers = [5, 0, 161, 5]
    for many, number in zip(dataset.__getitems__(numbers), numbers, strict=True):
        X, y, place = dataset[number]  # noqa: N806 - braindecode's word
        assert np.array_equal(many[0], X)
        assert (many[1], many[2]) == (y, place)
    assert dataset.__getitems__([]) == []


def test_items_of_other_targets(trials: Store, kinds: Store) -> None:
    """Regression gives float32 (1,), a signal its samples, and no target braindecode's -1."""
    y = trials.windows(TRIALS, EventColumn("rt")).dataset()[0][1]
    assert (y.dtype, y.tolist()) == (np.dtype("float32"), [np.float32(trials.events["rt"][0].as_py())])
    assert trials.windows(TRIALS).dataset()[0][1] == -1

    spec = FixedWindows(
        signal="stim", window_size_samples=33, beside=(Span(signal="robs", window_size_samples=1),)
    )
    frames, counts, _ = kinds.windows(spec, SignalTarget("robs")).dataset()[0]
    assert (frames.dtype, frames.shape) == (np.dtype("float32"), (33, 9, 9))
    assert (counts.dtype, counts.shape) == (np.dtype("float32"), (20, 1))


def test_items_of_several_signals_are_dicts(kinds: Store) -> None:
    """X names its arrays where there are several signals."""
    spec = FixedWindows(
        signal="stim", window_size_samples=33, beside=(Span(signal="robs", window_size_samples=1),)
    )
    X, _, _ = kinds.windows(spec).dataset()[0]  # noqa: N806 - braindecode's word
    assert isinstance(X, dict)
    assert {name: x.shape for name, x in X.items()} == {"stim": (33, 9, 9), "robs": (20, 1)}


def test_items_are_not_padded(kinds: Store) -> None:
    """Sentences read together keep their own lengths as items."""
    dataset = kinds.windows(
        FixedWindows(signal="eeg", where={"subject": ("sentence-0", "sentence-1")})
    ).dataset()
    long, short = dataset.__getitems__([0, 1])
    assert (long[0].shape, short[0].shape) == ((8, 700), (8, 1))


def first_windows(dataset: Any, n_workers: int, **options: Any) -> list[tuple[torch.Tensor, ...]]:
    """Pass once through a dataset with the stock ``DataLoader``."""
    loader = DataLoader(dataset, batch_size=32, num_workers=n_workers, **options)
    return [(X, y, *place) for X, y, place in loader]


@pytest.mark.slow
@forks
@pytest.mark.parametrize(("method", "shuffle"), [("fork", False), ("fork", True), ("spawn", True)])
def test_workers_read_the_same(windows: Windows, method: str, *, shuffle: bool) -> None:
    """The stock ``DataLoader`` gives the same with two workers as with none, shuffled or not."""
    dataset = windows.dataset()
    dataset[0]  # the store is open before the workers are made
    passes = []
    for n_workers in (0, 2):
        options = {"multiprocessing_context": method} if n_workers else {}
        generator = torch.Generator().manual_seed(5)
        passes.append(first_windows(dataset, n_workers, shuffle=shuffle, generator=generator, **options))
    for one, other in zip(*passes, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@forks
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than cores, on purpose
@pytest.mark.parametrize("n_workers", [0, 1, 2, 3])
def test_a_stream_has_one_order_for_any_workers(windows: Windows, n_workers: int) -> None:
    """Whole batches come in the loader's order, each once, whatever the number of workers."""
    stream = windows.iterable(16, mode="shuffled", drop_last=False)
    options = {"multiprocessing_context": "fork"} if n_workers else {}
    passing = DataLoader(stream, batch_size=None, num_workers=n_workers, **options)  # type: ignore[arg-type]
    batches: list[Batch] = list(passing)

    expected = list(windows.loader(16, mode="shuffled", drop_last=False))
    assert len(passing) == len(batches) == len(expected) == 11
    for one, other in zip(batches, expected, strict=True):
        assert one.numbers.tolist() == other.numbers.tolist()
        assert torch.equal(one.signals["eeg"], other.signals["eeg"])
        assert one.n_global == other.n_global


@pytest.mark.slow
@forks
@pytest.mark.parametrize("is_persistent", [False, True])
def test_a_stream_passes_through_the_epoch_that_is_set(windows: Windows, *, is_persistent: bool) -> None:
    """``set_epoch`` reaches the workers of the next pass, also those that live on."""
    stream = windows.iterable(16, mode="shuffled")
    passing: Any = DataLoader(
        stream,
        batch_size=None,
        num_workers=2,
        persistent_workers=is_persistent,
        multiprocessing_context="fork",
    )
    loader = windows.loader(16, mode="shuffled")
    for epoch in range(2):
        stream.set_epoch(epoch)
        expected = [batch.numbers.tolist() for batch in loader]
        assert [batch.numbers.tolist() for batch in passing] == expected
    for wrong in (1.5, 2**63):
        with pytest.raises(InputError, match=f"epoch is {wrong}, and must be a whole number"):
            stream.set_epoch(wrong)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(InputError):
        stream.set_epoch(-1)


@pytest.mark.slow
def test_a_spawned_stream_reads_the_same(windows: Windows) -> None:
    """A stream goes to a worker that is started anew."""
    stream = windows.iterable(64)
    passing: Any = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert [batch.numbers.tolist() for batch in passing] == [batch.numbers.tolist() for batch in stream]


@pytest.mark.slow
@forks
@pytest.mark.parametrize(
    ("method", "n_workers", "is_persistent"), [("fork", 2, False), ("fork", 2, True), ("spawn", 1, False)]
)
def test_a_pass_that_is_broken_off_leaves_nothing(
    windows: Windows, method: str, n_workers: int, *, is_persistent: bool
) -> None:
    """A stream's workers end with it, and the next pass begins from the start; two passes do not mix."""
    stream = windows.iterable(16, mode="shuffled", dtype="bfloat16")
    passing: Any = DataLoader(
        stream,
        batch_size=None,
        num_workers=n_workers,
        persistent_workers=is_persistent,
        multiprocessing_context=method,
    )
    expected = list(windows.loader(16, mode="shuffled", dtype="bfloat16"))
    for _, batch in zip(range(3), passing, strict=False):
        assert len(batch) == 16
    for batch, pair, same in zip(passing, stream, expected, strict=True):
        for one in (batch, pair):
            assert one.numbers.tolist() == same.numbers.tolist()
            assert torch.equal(one.signals["eeg"], same.signals["eeg"])
            assert one.signals["eeg"].dtype == torch.bfloat16
    del passing
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_stream_that_is_broken_off_leaves_no_thread(windows: Windows) -> None:
    """Without workers it reads by a thread of this process."""
    for _ in windows.iterable(16):
        assert [t.name for t in threading.enumerate() if t.name.startswith("engram")] == ["engram-read-0"]
        break
    assert not any(thread.name.startswith("engram") for thread in threading.enumerate())


@pytest.mark.slow
@forks
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than cores, on purpose
def test_more_workers_than_batches_are_no_matter(windows: Windows) -> None:
    """Those without a batch give none."""
    stream = windows.iterable(81)
    passing: Any = DataLoader(stream, batch_size=None, num_workers=3, multiprocessing_context="fork")
    assert [batch.numbers.tolist() for batch in passing] == [list(range(81)), list(range(81, 162))]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_braindecode_s_estimators_fit_the_dataset(trials: Store, task: str) -> None:
    """``EEGClassifier`` and ``EEGRegressor`` train on the dataset as it is, and predict from it."""
    braindecode = pytest.importorskip("braindecode")
    is_classes = task == "classification"
    windows = trials.windows(TRIALS, SORT if is_classes else EventColumn("rt"))
    estimator = braindecode.EEGClassifier if is_classes else braindecode.EEGRegressor
    net = estimator(
        "ShallowFBCSPNet",
        module__n_outputs=windows.n_outputs,
        module__final_conv_length="auto",
        module__pool_time_length=5,
        module__pool_time_stride=2,
        module__filter_time_length=5,
        batch_size=32,
        max_epochs=1,
        train_split=None,
        verbose=0,
        **({"classes": [0, 1]} if is_classes else {}),
    )
    net.fit(windows.dataset(), y=None)

    assert np.isfinite(net.history[-1, "train_loss"])
    assert len(net.predict(windows.dataset())) == len(windows)
