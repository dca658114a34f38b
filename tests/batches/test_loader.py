"""The loader: batches in order, from any place, within a budget."""

from __future__ import annotations

import gc
import json
import multiprocessing
import re
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from engram.batches import loader as loader_module
from engram.batches.batch import Batch
from engram.batches.loader import Loader
from engram.batches.windows import Windows
from engram.errors import DoesNotFit, InputError
from engram.memory import Budget, Limit, Usage
from engram.preparation.ingest import prepare
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.recordings.recording import Events
from engram.store.backend import Part
from engram.store.gather import Ranges
from engram.store.grid import Grid
from engram.store.reader import Store
from engram.windows.order import Cursor, Mode
from engram.windows.spec import EventWindows, FixedWindows, Span
from engram.windows.targets import RecordingColumn, SignalTarget, TimeTo

SPEC = FixedWindows(signal="eeg", window_size_s=0.5)
SENTENCES = FixedWindows(signal="eeg", where={"subject": tuple(f"sentence-{i}" for i in range(7))})
STIMULUS = FixedWindows(
    signal="stim", window_size_samples=33, beside=(Span(signal="robs", window_size_samples=1),)
)

forks = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"  # fork is the point
)


@pytest.fixture
def windows(trials: Store) -> Windows:
    """120 windows of 4 channels and 50 samples, 40 of each subject."""
    return trials.windows(SPEC, RecordingColumn("age"))


@pytest.fixture(params=["page cache", "past it"])
def way(request: pytest.FixtureRequest, windows: Windows, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that a file is read: a loader takes the second where data is far larger than memory."""
    if request.param == "past it":
        if not windows.can_be_read_directly():
            pytest.skip("temporary files cannot be read past the page cache here")
        monkeypatch.setattr(loader_module, "_is_cache_useless", lambda *_: True)
    return str(request.param)


def assert_rows(batch: Batch, whole: Batch, rank: int = 0, world: int = 1) -> None:
    """One rank's rows of a batch, equal to the last bit."""
    pairs = [(batch.numbers, whole.numbers), *((x, whole.signals[name]) for name, x in batch.signals.items())]
    if whole.y is not None:
        assert batch.y is not None
        pairs.append((batch.y, whole.y))
    for one, other in pairs:
        assert one.dtype == other.dtype
        # Of the longest window among all ranks; others are followed by zeros.
        rows = other[rank::world][tuple(slice(length) for length in (None, *one.shape[1:]))]
        assert one.shape == rows.shape
        assert one.numpy(force=True).tobytes() == rows.numpy(force=True).tobytes()
    assert batch.n_global == len(whole)


def numbers_of(batches: object) -> list[list[int]]:
    """Name the windows of batches."""
    assert hasattr(batches, "__iter__")
    return [batch.numbers.tolist() for batch in batches]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_loader_is_its_order_from_any_place(windows: Windows, data: st.DataObject) -> None:
    """Over modes, batch sizes, ranks and places to resume at: the model is the list of batches."""
    mode: Mode = data.draw(st.sampled_from(["sequential", "shuffled", "blocks", "groups", "balanced"]))
    by = "subject" if mode in ("groups", "balanced") else None
    world = data.draw(st.integers(1, 5))
    rank = data.draw(st.integers(0, world - 1))
    batch_size = data.draw(st.integers(1, 130))
    order = windows.order(batch_size, mode=mode, by=by)
    model = [
        (epoch, number, order.share(epoch, number, rank, world).tolist())
        for epoch in range(2)
        for number in range(order.n_batches)
    ]
    first = data.draw(st.integers(0, len(model) - 1))

    loader = windows.loader(batch_size, mode=mode, by=by, rank=rank, world=world)
    loader.load_state_dict(
        {"fingerprint": order.fingerprint, "epoch": model[first][0], "n_batches": model[first][1]}
    )
    assert len(loader) == order.n_batches
    read = [numbers for _ in range(2 - model[first][0]) for numbers in numbers_of(loader)]
    assert read == [numbers for _, _, numbers in model[first:]]


def test_batches_hold_what_their_windows_are(windows: Windows) -> None:
    """A batch's samples and targets are those of its numbers; its global size is that over all ranks."""
    for batch in windows.loader(50, mode="shuffled", drop_last=False, rank=1, world=3):
        same = windows.read(batch.numbers.tolist())
        assert torch.equal(batch.signals["eeg"], same.signals["eeg"])
        assert batch.y is not None
        assert same.y is not None
        assert torch.equal(batch.y, same.y)
        assert batch.n_global == (20 if len(batch) < 10 else 50)


def test_crops_and_shifts_are_drawn_of_seed_epoch_and_window(trials: Store) -> None:
    """In whichever batch, rank and thread; a loader that does not draw gives the middles."""
    spec = FixedWindows(signal="eeg", window_size_samples=100, crop_samples=40, shift_samples=5)
    windows = trials.windows(spec)
    assert windows.n_times == 40
    assert windows.batch_bytes(3) == 3 * 4 * 40 * 4
    recordings = windows.index.tables.ids

    def expected(number: int, offset: int) -> Any:
        whole = windows.index.locate([number])
        start = int(whole.starts["eeg"][0]) + offset
        return trials.read(recordings[whole.recording[0]], "eeg", start, start + 40).T

    seen: dict[int, int] = {}
    for world, threads, batch_size in ((1, 2, 7), (3, 1, 12)):
        for rank in range(world):
            loader = windows.loader(
                batch_size,
                mode="shuffled",
                seed=5,
                drop_last=False,
                rank=rank,
                world=world,
                threads=threads,
                is_drawn=True,
            )
            loader.set_epoch(2)
            for batch in loader:
                offsets = windows.index.draw(batch.numbers.numpy(), 5, 2)
                for number, offset, x in zip(batch.numbers.tolist(), offsets.tolist(), batch.X, strict=True):
                    assert np.array_equal(x.numpy(), expected(number, offset))
                    assert seen.setdefault(number, offset) == offset
    assert len(seen) == len(windows)
    assert len(set(seen.values())) > 20
    for batch in windows.loader(7, mode="shuffled", seed=5):
        for number, x in zip(batch.numbers.tolist(), batch.X, strict=True):
            assert np.array_equal(x.numpy(), expected(number, 30))


def test_a_shift_is_taken_from_a_time(trials: Store) -> None:
    """From the window to the answer: later windows are nearer to it, by as much as they are later."""
    spec = EventWindows(signal="eeg", anchor=("left",), trial_duration_s=0.5, shift_samples=9)
    windows = trials.windows(spec, TimeTo(("right",)))
    assert len(windows) > 8
    order: dict[str, Any] = {"batch_size": 7, "mode": "shuffled", "seed": 3, "drop_last": False}
    moved_s: list[float] = []
    for drawn, still in zip(windows.loader(**order, is_drawn=True), windows.loader(**order), strict=True):
        late_s = windows.index.draw(drawn.numbers.numpy(), 3, 0) / 100.0
        assert drawn.y is not None
        assert still.y is not None
        np.testing.assert_allclose((still.y - drawn.y)[:, 0], late_s, atol=1e-6)
        moved_s += late_s.tolist()
    assert len(set(moved_s)) > 5


def test_epochs_differ_and_come_again(windows: Windows) -> None:
    """Each pass is the next epoch; another loader of the same order gives the same ones."""
    loader, other = windows.loader(32, mode="shuffled"), windows.loader(32, mode="shuffled")
    epochs = [numbers_of(loader) for _ in range(3)]

    assert epochs[0] != epochs[1] != epochs[2]
    assert [numbers_of(other) for _ in range(3)] == epochs
    assert loader.cursor.epoch == 3


def test_a_pass_that_was_broken_off_begins_again(windows: Windows) -> None:
    """Looking at one batch costs nothing: the next pass is the same epoch from its start."""
    loader = windows.loader(32, mode="shuffled")
    whole = numbers_of(windows.loader(32, mode="shuffled"))

    assert next(iter(loader)).numbers.tolist() == whole[0]
    assert loader.cursor.n_batches == 1
    assert numbers_of(loader) == whole


def test_who_counts_the_batches_comes_to_the_next_epoch(windows: Windows) -> None:
    """The last batch ends the epoch, also for a caller that knows the length and never asks for more."""
    loader = windows.loader(32, mode="shuffled")
    first = numbers_of(islice(iter(loader), len(loader)))

    assert (loader.cursor.epoch, loader.cursor.n_batches) == (1, 0)
    assert numbers_of(islice(iter(loader), len(loader))) != first


def test_a_whole_epoch_that_was_trained_is_not_repeated(windows: Windows) -> None:
    """Who counts batches alone stands at an epoch's end: the next pass is of the next epoch."""
    loader = windows.loader(4, mode="shuffled")
    loader.load_state_dict(Cursor(loader.order.fingerprint, 1, len(loader)).to_dict())
    assert loader.cursor.epoch == 2
    assert [batch.numbers.tolist() for batch in loader] == [
        loader.order.batch(2, number).tolist() for number in range(len(loader))
    ]


def test_an_iterator_that_is_never_used_changes_nothing(windows: Windows) -> None:
    """The place that was loaded waits for the first batch, however many iterators were made before."""
    loader = windows.loader(32, mode="shuffled", drop_last=False)
    whole = numbers_of(windows.loader(32, mode="shuffled", drop_last=False))
    loader.load_state_dict({"fingerprint": loader.order.fingerprint, "epoch": 0, "n_batches": 2})
    iter(loader)

    assert numbers_of(loader) == whole[2:]


def test_a_state_is_plain_and_goes_on_anywhere(windows: Windows) -> None:
    """A state survives JSON, and counts the batches handed out."""
    loader = windows.loader(16, mode="shuffled")
    passing = iter(loader)
    for _ in range(3):
        next(passing)
    state = json.loads(json.dumps(loader.state_dict()))
    rest = numbers_of(passing)

    other = windows.loader(16, mode="shuffled")
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert numbers_of(other) == rest


@pytest.mark.parametrize("change", ["batch_size", "seed", "mode", "windows"])
def test_the_state_of_another_order_is_refused(windows: Windows, change: str) -> None:
    """Another batch size, seed, mode or set of windows is another order: an error, not a wrong place."""
    state = windows.loader(16, mode="shuffled").state_dict()
    if change == "windows":
        windows = Windows(windows.store, windows.index.take(np.arange(len(windows)) > 0))
    other = windows.loader(
        17 if change == "batch_size" else 16,
        mode="blocks" if change == "mode" else "shuffled",
        seed=int(change == "seed"),
    )
    with pytest.raises(InputError, match="belongs to order"):
        other.load_state_dict(state)


def test_set_epoch_keeps_a_place_within_that_epoch(windows: Windows) -> None:
    """``set_epoch`` goes to an epoch's start, and does not undo a state that is within it."""
    loader = windows.loader(32, mode="shuffled")
    epochs = [numbers_of(loader) for _ in range(3)]

    loader.set_epoch(1)
    assert numbers_of(loader) == epochs[1]
    loader.load_state_dict({"fingerprint": loader.order.fingerprint, "epoch": 2, "n_batches": 1})
    loader.set_epoch(2)
    assert numbers_of(loader) == epochs[2][1:]
    for wrong in (-1, 1.5, "1", None, 2**63):
        with pytest.raises(InputError, match=re.escape(f"epoch is {wrong!r}, and must be")):
            loader.set_epoch(wrong)  # type: ignore[arg-type]  # that is the point
    loader.set_epoch(np.int64(1))  # type: ignore[arg-type]  # as whoever counts in an array
    assert json.dumps(loader.state_dict()["epoch"]) == "1"


def test_who_looks_at_a_batch_meanwhile_does_not_move_the_place(windows: Windows) -> None:
    """The pass that goes on says where it is, and the next one is of the next epoch."""
    loader = windows.loader(16, mode="shuffled")
    for number, _ in enumerate(loader, 1):
        if number == 2:
            assert next(iter(loader)).numbers.tolist()
        elif number == 3:
            assert loader.cursor.n_batches == 3
    assert loader.cursor.epoch == 1


def test_a_pass_under_way_does_not_move_a_place_that_was_set(windows: Windows) -> None:
    """What was loaded, or set, is where the next pass begins, whoever still reads on."""
    loader = windows.loader(32, mode="shuffled")
    epochs = [numbers_of(loader) for _ in range(3)]
    for _ in range(2):
        passing = iter(loader)
        next(passing)
        loader.load_state_dict({"fingerprint": loader.order.fingerprint, "epoch": 1, "n_batches": 2})
        assert next(passing).numbers.tolist()
        assert numbers_of(loader) == epochs[1][2:]
        next(passing)
        loader.set_epoch(0)
        numbers_of(passing)
        assert loader.cursor == Cursor(loader.order.fingerprint, 0)
        assert numbers_of(loader) == epochs[0]


def test_two_loaders_do_not_disturb_each_other(windows: Windows) -> None:
    """Two loaders, and two of one store in turn, give what each gives alone."""
    alone = [numbers_of(windows.loader(16, mode="shuffled", seed=seed)) for seed in (0, 1)]
    both = zip(*(windows.loader(16, mode="shuffled", seed=seed) for seed in (0, 1)), strict=True)
    together = [list(one) for one in zip(*(numbers_of(pair) for pair in both), strict=True)]
    assert together == alone


def test_ranks_share_every_batch(windows: Windows) -> None:
    """The rows of all ranks are the batch, each window once."""
    order = windows.order(32, mode="shuffled", drop_last=False)
    ranks = [windows.loader(32, mode="shuffled", drop_last=False, rank=rank, world=3) for rank in range(3)]
    for number, parts in enumerate(zip(*ranks, strict=True)):
        rows = sorted(row for part in parts for row in part.numbers.tolist())
        assert rows == sorted(order.batch(0, number).tolist())
    with pytest.raises(InputError, match="rank is 3, and must be a whole number from 0 to 2"):
        windows.loader(32, rank=3, world=3)


def test_an_order_of_other_windows_is_refused(windows: Windows) -> None:
    """A loader takes the order of its own windows only."""
    fewer = Windows(windows.store, windows.index.take(np.arange(len(windows)) > 0))
    with pytest.raises(InputError, match="not of these 119"):
        Loader(fewer, windows.order(8))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["trials", "sentences", "stimulus"]),
    batch_size=st.integers(1, 40),
    memory=st.sampled_from(["16 MB", "32 MB", "500 MB"]),
    threads=st.integers(1, 5),
    check=st.sampled_from([None, "crc"]),
)
def test_batches_are_one_whatever_reads_them(
    way: str,
    windows: Windows,
    kinds: Store,
    kind: str,
    batch_size: int,
    memory: str,
    threads: int,
    check: Any,
) -> None:
    """Over budgets, threads and checks, lengths and precisions: the model reads each batch alone."""
    if kind == "sentences":
        windows = kinds.windows(SENTENCES)
    if kind == "stimulus":
        windows = kinds.windows(STIMULUS, SignalTarget("robs"))
    loader = windows.loader(
        batch_size, mode="shuffled", drop_last=False, memory=memory, threads=threads, check=check
    )
    if memory == "500 MB":
        assert loader.is_direct == (way == "past it" and check is None)
    for epoch in range(2):
        for number, batch in enumerate(loader):
            assert_rows(batch, windows.read(loader.order.batch(epoch, number)))


@pytest.mark.slow
@forks
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than cores, on purpose
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_ranks_and_workers_share_one_order_from_any_place(windows: Windows, world: int) -> None:
    """Over ranks, workers, budgets, threads and places to resume at: rows r::world of the same bytes.

    The last batch is of one window, so that most ranks have none of it.
    """
    order = windows.order(7, mode="shuffled", drop_last=False)
    expected = [windows.read(order.batch(1, number)) for number in range(order.n_batches)]
    assert len(expected[-1]) == 1
    share: dict[str, Any] = {"batch_size": 7, "mode": "shuffled", "drop_last": False, "world": world}
    for rank in range(world):
        for left, threads, first in ((76_000, 3, 0), (10**6, 3, 5), (2 * 10**9, 1, len(expected) - 1)):
            memory = windows.tables_bytes + left
            loader = windows.loader(memory=memory, threads=threads, rank=rank, **share)
            state = Cursor(order.fingerprint, epoch=1, n_batches=first).to_dict()
            loader.load_state_dict(json.loads(json.dumps(state)))
            for batch, whole in zip(loader, expected[first:], strict=True):
                assert_rows(batch, whole, rank, world)
        stream = windows.iterable(rank=rank, **share)
        stream.set_epoch(1)
        for n_workers in (0, 2):
            options: Any = {"multiprocessing_context": "fork"} if n_workers else {}
            passing = DataLoader(stream, batch_size=None, num_workers=n_workers, **options)
            for batch, whole in zip(passing, expected, strict=True):
                assert_rows(batch, whole, rank, world)


RANK = """
import sys
import torch
import torch.distributed as dist
import engram
from engram.windows.spec import FixedWindows
from engram.windows.targets import RecordingColumn

path, port, rank, to = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=int(rank), world_size=2)
with engram.open(path) as store:
    windows = store.windows(FixedWindows(signal="eeg", window_size_s=0.5), RecordingColumn("age"))
    loader = windows.loader(
        7, mode="shuffled", drop_last=False, rank=dist.get_rank(), world=dist.get_world_size()
    )
    found = []
    for batch in loader:
        both = [None, None]
        dist.all_gather_object(both, (batch.numbers, batch.X, batch.y, batch.n_global))
        found.append(both)
if rank == "0":
    torch.save(found, to)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_over_gloo_share_every_batch(windows: Windows, tmp_path: Path) -> None:
    """Started as a cluster would start them, they read at each step what one process reads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", RANK, str(windows.store.path), str(port)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "found")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said

    found = torch.load(tmp_path / "found")
    for both, whole in zip(found, windows.loader(7, mode="shuffled", drop_last=False), strict=True):
        for rank, (numbers, eeg, y, n_global) in enumerate(both):
            assert_rows(Batch({"eeg": eeg}, {}, y, numbers, n_global), whole, rank, 2)


def test_an_error_comes_in_the_place_of_its_batch(kinds: Store) -> None:
    """Batches before the one that mixes sessions of 20 and 21 units are right, in every pass."""
    windows = kinds.windows(FixedWindows(signal="robs", window_size_samples=10), same_form=False)
    loader = windows.loader(5, threads=3)
    for _ in range(2):
        passing = iter(loader)
        for number in range(4):
            assert_rows(next(passing), windows.read(loader.order.batch(0, number)))
        with pytest.raises(InputError, match="cannot share a batch"):
            next(passing)
        with pytest.raises(StopIteration):
            next(passing)
        assert loader.cursor.n_batches == 4


def test_one_loader_may_be_iterated_by_two(windows: Windows) -> None:
    """Both are of the same epoch; the next pass is of the next one."""
    loader = windows.loader(32, mode="shuffled")
    whole = numbers_of(windows.loader(32, mode="shuffled"))
    pairs = list(zip(loader, loader, strict=True))
    assert numbers_of(one for one, _ in pairs) == numbers_of(other for _, other in pairs) == whole
    assert loader.cursor.epoch == 1


def _send_rest(passing: Iterator[Batch], pipe: Any) -> None:
    pipe.send([(batch.numbers.tolist(), float(batch.signals["eeg"].sum())) for batch in passing])


@forks
@pytest.mark.usefixtures("way")
def test_a_child_goes_on_with_its_parent_s_pass(windows: Windows) -> None:
    """Forked in the middle of an epoch, it reads the rest as the parent does."""
    context = multiprocessing.get_context("fork")
    passing = iter(windows.loader(8, mode="shuffled", threads=3))
    held = [next(passing) for _ in range(4)]
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send_rest, args=(passing, theirs))
    child.start()
    assert mine.poll(60)
    rest = mine.recv()
    child.join(60)
    assert child.exitcode == 0
    for end in (child, mine, theirs):
        end.close()
    assert [(batch.numbers.tolist(), float(batch.signals["eeg"].sum())) for batch in passing] == rest
    assert len(rest) == 11
    for batch in held:
        assert_rows(batch, windows.read(batch.numbers.numpy()))


@pytest.mark.usefixtures("way")
def test_threads_end_with_the_pass(windows: Windows) -> None:
    """As many as were asked for, and none when it is broken off."""
    for _ in windows.loader(4, threads=3, memory="50 MB"):
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("engram-read")]
        assert names == ["engram-read-0", "engram-read-1", "engram-read-2"]
        break
    assert not any(thread.name.startswith("engram") for thread in threading.enumerate())


# What a model is given.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("signal", ["eeg", "stim", "image", "betas"])
def test_a_model_is_given_the_dtype_it_asks_for(kinds: Store, signal: str, dtype: Any) -> None:
    """Floats of all precisions, frames, volumes, a bank's images: what PyTorch makes of them, to the bit."""
    where = {"subject": tuple(f"sentence-{i}" for i in range(7))} if signal == "eeg" else {}
    n_samples = {"eeg": None, "stim": 40, "image": 2, "betas": 1}[signal]
    spec = FixedWindows(signal=signal, window_size_samples=n_samples, where=where)
    windows = kinds.windows(spec, same_form=False)
    by: Any = {"mode": "groups", "by": "recording"} if signal == "stim" else {}
    loader = windows.loader(3, dtype=dtype, **by)
    for batch in loader:
        as_stored = windows.read(batch.numbers.numpy()).signals[signal]
        assert batch.signals[signal].dtype == getattr(torch, dtype)
        assert torch.equal(batch.signals[signal], as_stored.to(getattr(torch, dtype)))
    assert batch.signals[signal].is_contiguous()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_targets_keep_their_own_dtype(kinds: Store, windows: Windows, dtype: Any) -> None:
    """A signal that is the target stays the integers it is stored as; a figure stays float32."""
    frames = kinds.windows(STIMULUS, SignalTarget("robs"))
    for batch in frames.loader(4, dtype=dtype):
        assert batch.signals["stim"].dtype == getattr(torch, dtype)
        assert batch.y is not None
        assert batch.y.dtype == torch.int16
        assert torch.equal(batch.y, frames.read(batch.numbers.numpy()).y)  # type: ignore[arg-type]  # a tensor
    batch = next(iter(windows.loader(4, dtype=dtype)))
    assert batch.y is not None
    assert batch.y.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_rank_without_rows_is_given_the_same_forms(windows: Windows, dtype: Any) -> None:
    """Tensors of no rows, of the dtype and shape that the others have."""
    ranks = [windows.loader(7, dtype=dtype, rank=rank, world=3) for rank in range(3)]
    *_, last = zip(*ranks, strict=True)
    assert [len(batch) for batch in last] == [1, 0, 0]
    assert {batch.n_global for batch in last} == {1}
    assert {(x.signals["eeg"].dtype, *x.signals["eeg"].shape[1:]) for x in last} == {
        (getattr(torch, dtype or "float32"), 4, 50)
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "float16"}, "no dtype='float16'. Use None or one of: float32, bfloat16"),
        ({"dtype": torch.bfloat16}, "no dtype=torch.bfloat16. Use None or one of"),
        ({"check": "md5"}, "no check='md5'. Use None or one of: crc"),
        ({"check": True}, "no check=True. Use None or one of: crc"),
        ({"threads": 0}, "threads is 0, and must be a whole number from 1 to"),
        ({"threads": -2}, "threads is -2, and must be"),
        ({"threads": "2"}, "threads is '2', and must be"),
        ({"threads": True}, "threads is True, and must be"),
        ({"world": 2.0}, "world is 2.0, and must be a whole number from 1 to"),
        ({"world": 0}, "world is 0, and must be"),
        ({"rank": 2, "world": 2}, "rank is 2, and must be a whole number from 0 to 1. Use one."),
        ({"rank": 0.5, "world": 2}, "rank is 0.5, and must be"),
        ({"rank": None}, "rank is None, and must be"),
    ],
)
def test_settings_that_there_are_not_are_refused(windows: Windows, settings: Any, message: str) -> None:
    """With those that there are."""
    with pytest.raises(InputError, match=re.escape(message)):
        windows.loader(4, **settings)
    if not {"threads", "check"} & {*settings}:
        with pytest.raises(InputError, match=re.escape(message)):
            windows.iterable(4, **settings)


def _digest(loader: Loader) -> list[tuple[list[int], float]]:
    return [(batch.numbers.tolist(), float(batch.signals["eeg"].sum())) for batch in loader]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # fork is the point
@pytest.mark.usefixtures("way")
def test_a_loader_reads_the_same_in_a_child(windows: Windows, method: str) -> None:
    """A loader that has read here goes on in a child that was forked or spawned, as if it were here."""
    loader = windows.loader(32, mode="shuffled")
    list(loader)
    with multiprocessing.get_context(method).Pool(1) as pool:
        there = pool.apply(_digest, [loader])
    assert there == _digest(loader)


def _hold(n_bytes: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loader_module, "read_usage", lambda: Usage(n_bytes, 1, "PSS"))


def test_a_budget_lists_what_the_loader_holds(windows: Windows) -> None:
    """Index, order, batches and buffers are lines, and a batch is no larger than its line."""
    loader = windows.loader(32, mode="groups", by="subject", memory="50 MiB", threads=2)
    lines = {line.name: line.n_bytes for line in loader.budget.spendings}
    batch: Batch = next(iter(loader))

    assert list(lines) == [
        "tables of the store",
        "index of windows",
        "order",
        "windows looked up ahead",
        "3 batches of 32 windows",
        "buffers of 2 threads",
    ]
    assert lines["index of windows"] == windows.index.n_bytes
    assert lines["order"] == loader.order.n_bytes > 4 * len(windows)
    # A target may take 8 bytes, and takes 4 here; a page of 4 KiB has an entry of 8 bytes in a table.
    n_bytes = batch.n_bytes + 4 * 32
    assert lines["3 batches of 32 windows"] == 3 * (n_bytes + n_bytes // 512)
    assert lines["tables of the store"] == windows.tables_bytes > 2 * windows.index.tables.n_bytes


def test_what_the_process_holds_counts_where_all_there_is_is_shared(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``memory``, what the process holds is a line, of which tables, index and order are a part."""
    _hold(100 << 20, monkeypatch)
    lines = {line.name: line.n_bytes for line in windows.loader(32).budget.spendings}
    own = ("tables of the store", "index of windows", "order")
    assert lines["this process"] + sum(lines[name] for name in own) == 100 << 20


@pytest.mark.parametrize("world", [1, 2])
def test_what_does_not_fit_names_the_batch_size_that_does(windows: Windows, world: int) -> None:
    """The remedy can be followed: the batch size named fits, one more window per rank does not."""
    memory = windows.tables_bytes + (76 << 10)
    with pytest.raises(DoesNotFit, match=f"2 batches of {120 // world} windows") as caught:
        windows.loader(120, memory=memory, world=world)
    found = re.search(r"Use batch_size=(\d+) or less", str(caught.value))
    assert found is not None
    batch_size = int(found[1])

    assert 0 < batch_size < 120
    assert caught.value.needed_bytes > caught.value.allowed_bytes == memory
    windows.loader(batch_size, memory=memory, world=world)
    with pytest.raises(DoesNotFit):
        windows.loader(batch_size + 1, memory=memory, world=world)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    left=st.integers(6_000, 250_000),
    world=st.integers(1, 3),
    dtype=st.sampled_from([None, "bfloat16"]),
    check=st.sampled_from([None, "crc"]),
)
def test_the_batch_size_that_is_named_fits_exactly(
    windows: Windows, left: int, world: int, dtype: Any, check: Any
) -> None:
    """Over budgets, ranks, dtypes and checks: it fits, one window more does not."""
    memory = windows.tables_bytes + left

    def fits(batch_size: int) -> bool:
        try:
            windows.loader(batch_size, memory=memory, world=world, dtype=dtype, check=check)
        except DoesNotFit as error:
            found = re.search(r"Use batch_size=(\d+) or less", str(error))
            named.append(int(found[1]) if found else 0)
            return False
        return True

    named: list[int] = []
    if not fits(120):
        (batch_size,) = named
        assert 0 <= batch_size < 120
        assert not fits(batch_size + 1)
        assert not batch_size or fits(batch_size)


@pytest.mark.parametrize("check", [None, "crc"])
def test_the_budget_decides_how_many_batches_and_threads(windows: Windows, check: Any) -> None:
    """A thread for every batch but one, two batches more than threads where there is room; all lines fit."""

    def sizes(memory: int) -> tuple[int, int]:
        loader = windows.loader(30, memory=memory, threads=3, check=check)
        assert loader.budget.left_bytes >= 0
        return loader.sizes.n_slots, loader.sizes.n_threads

    lines = {
        line.name: line.n_bytes
        for line in windows.loader(30, memory="1 GB", threads=3, check=check).budget.spendings
    }
    of_slot, of_thread = lines.pop("4 batches of 30 windows") // 4, lines.pop("buffers of 3 threads") // 3
    held = sum(lines.values())
    assert ("checksums" in lines) == (check == "crc")
    assert of_thread >= windows.scratch_bytes()
    assert check is None or of_thread >= windows.store.extent("sub-0", "eeg").part.grid.block_bytes

    for n_slots, n_threads in ((4, 3), (3, 2), (2, 1)):
        memory = held + n_slots * of_slot + n_threads * of_thread
        assert sizes(memory) == (n_slots, n_threads)
        if n_slots > 2:
            assert sizes(memory - 1) < (n_slots, n_threads)
        else:
            with pytest.raises(DoesNotFit):
                sizes(memory - 1)
    assert windows.loader(8, memory="1 GB", threads=3).sizes.n_slots == 5
    assert windows.loader(120, memory="1 GB", threads=3).sizes.n_slots == 2


@pytest.mark.parametrize(
    ("dtype", "check"), [(None, None), (None, "crc"), ("bfloat16", None), ("float32", "crc")]
)
@pytest.mark.parametrize("kind", ["eeg", "sentences", "stimulus", "volumes"])
@pytest.mark.usefixtures("way")
def test_a_loader_holds_no_more_than_its_lines(kinds: Store, kind: str, dtype: Any, check: Any) -> None:
    """Over two epochs, with the last batch of the first still in hand when the second begins."""
    spec = {
        "eeg": FixedWindows(
            signal="eeg",
            window_size_samples=200,
            window_stride_samples=20,
            where={"subject": ("eeg-129",)},
        ),
        "sentences": SENTENCES,
        "stimulus": STIMULUS,
        "volumes": FixedWindows(signal="betas", window_size_samples=1),
    }[kind]
    windows = kinds.windows(spec, SignalTarget("robs") if kind == "stimulus" else None)
    batch_size = {"eeg": 16, "sentences": 3, "stimulus": 4, "volumes": 1}[kind]
    loader = windows.loader(
        batch_size,
        mode="shuffled",
        drop_last=False,
        dtype=dtype,
        check=check,
        memory="200 MB",
        threads=2,
    )
    lines = assert_holds(loader)
    assert lines["peak"] >= max(n_bytes for name, n_bytes in lines.items() if "batches of" in name) / 2


def assert_holds(loader: Loader) -> dict[str, int]:
    """Pass twice through a loader, which holds no more than its lines; give them, and the peak."""
    assert loader.is_direct == (
        loader.check is None and loader_module._is_cache_useless(loader.windows, loader.order)
    )
    numbers_of(loader)  # files and tables are open
    held = {"tables of the store", "index of windows", "order", "checksums", "scales of int16"}
    lines = {line.name: line.n_bytes for line in loader.budget.spendings if line.name not in held}

    gc.collect()
    gc.disable()
    tracemalloc.start()
    for _ in range(2):
        for batch in loader:
            assert len(batch)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    gc.enable()
    # Threads, futures and other objects of Python are some kilobytes.
    assert peak_bytes <= sum(lines.values()) + 128 * 1024
    return {**lines, "peak": peak_bytes}


def test_the_page_cache_is_passed_where_it_is_of_no_use(
    kinds: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Large windows in a random order, each piece read once, of four times as much as memory leaves."""
    rng = np.random.default_rng(0)
    eeg = ArraySignal(rng.normal(0, 10, (4000, 129)).astype("float32"), 100.0)
    with prepare(ArraySource({"a": ArrayRecording({"eeg": eeg})}), tmp_path / "store").store as store:
        spec = FixedWindows(signal="eeg", window_size_s=2.0)  # 20 of 51,600 bytes
        windows = store.windows(spec)
        if not windows.can_be_read_directly():
            pytest.skip("temporary files cannot be read past the page cache here")
        assert windows.stored_bytes == 20 * 51_600

        def is_direct(windows: Windows, free_bytes: int, **options: Any) -> bool:
            limit = Limit("host", allowed_bytes=free_bytes, used_bytes=0, where="here")
            monkeypatch.setattr(loader_module, "binding_limit", lambda **_: limit)
            return windows.loader(4, **{"memory": "1 GB", "mode": "shuffled", **options}).is_direct

        few = 20 * 51_600 // 4 - 1
        assert is_direct(windows, few)
        assert not is_direct(windows, few + 1)
        assert not is_direct(windows, few, mode="sequential")
        assert not is_direct(windows, few, mode="blocks")
        assert is_direct(windows, few, mode="groups", by="recording")
        assert not is_direct(windows, few, check="crc")
        assert not is_direct(store.windows(FixedWindows(signal="eeg", window_size_s=1.0)), few)
        overlapping = FixedWindows(signal="eeg", window_size_s=2.0, window_stride_s=1.0)
        assert not is_direct(store.windows(overlapping), few)
        assert is_direct(kinds.windows(FixedWindows(signal="betas", window_size_samples=1)), 1000)

        # Where its buffers do not fit beside two batches, it is the page cache after all.
        sizes = [windows.scratch_bytes(is_direct=is_direct) for is_direct in (False, True)]
        assert sizes[1] - sizes[0] == (4 << 20) + 4096
        spent_bytes = windows.loader(4, mode="shuffled", memory="1 GB", threads=1).budget.spent_bytes
        memory = spent_bytes - windows.batch_bytes(4)  # two batches and one thread's buffers
        assert is_direct(windows, few, memory=memory, threads=1)
        assert not is_direct(windows, few, memory=memory - 10_000, threads=1)


def test_the_kernel_is_asked_until_it_has_everything(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not again, from pass to pass, until a window is missing; always where whole blocks are compared."""
    asked: list[int] = []
    monkeypatch.setattr(loader_module, "hint", lambda backend, ranges, **_: asked.append(len(ranges)))
    monkeypatch.setattr(loader_module, "_ENOUGH_HITS", 12)
    monkeypatch.setattr(loader_module, "_HITS_APART", 1)
    looked: list[int] = []
    found = True

    def is_cached(_: object, ranges: Ranges) -> bool:
        looked.append(len(ranges))
        return found

    monkeypatch.setattr(loader_module, "is_cached", is_cached)

    def asked_in_a_pass(loader: Loader) -> int:
        asked.clear()
        for batch in loader:
            assert len(batch) == 12
        return len(asked)

    loader = windows.loader(12, mode="shuffled", memory="20 MB")
    assert len(loader) == 10
    assert [asked_in_a_pass(loader) for _ in range(3)] == [10, 2, 0]
    found = False
    assert asked_in_a_pass(loader) == 10
    found = True
    assert [asked_in_a_pass(loader) for _ in range(3)] == [10, 2, 0]

    # After 30, 32 and 40 are looked at; from there on, what is missing is.
    monkeypatch.setattr(loader_module, "_HITS_APART", 8)
    looked.clear()
    assert asked_in_a_pass(loader) == 0
    assert len(looked) == 1
    found = False
    assert [asked_in_a_pass(loader) for _ in range(2)] == [10, 10]

    checking = windows.loader(12, mode="shuffled", memory="20 MB", check="crc")
    assert [asked_in_a_pass(checking) for _ in range(3)] == [10, 10, 10]
    past = Loader(windows, windows.order(12), budget=Budget.of("100 MB"), is_direct=True)
    assert asked_in_a_pass(past) == 0
    with pytest.raises(InputError, match="check='crc' reads through the page cache"):
        Loader(windows, windows.order(12), check="crc", is_direct=True)


def test_each_signal_that_leaves_the_page_cache_is_seen(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, every eighth piece is always of the same one."""
    asked: list[str] = []
    is_there = {"eeg": True, "stim": True}
    monkeypatch.setattr(loader_module, "is_cached", lambda _, ranges: is_there[ranges.first.signal])
    monkeypatch.setattr(loader_module, "hint", lambda _, ranges, **__: asked.append(ranges.first.signal))
    share = loader_module.Share(windows, windows.order(12), 0)
    column = np.array([[0], [0], [1], [0], [0]])
    pieces = [Ranges([Part("p", name, Grid(10, (), "uint8"))], "exact", column) for name in is_there]

    def ask(n_batches: int) -> list[str]:
        asked.clear()
        for _ in range(n_batches):
            for piece in pieces:
                share.hint(piece)
        return asked

    ask(300)
    assert ask(20) == []
    is_there["eeg"] = False
    assert set(ask(8)) == {"eeg"}
    assert ask(20) == ["eeg"] * 20


def test_what_windows_share_is_left_to_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large rows of a bank that come again, and trials that reach into the next one, however few."""
    monkeypatch.setattr(loader_module, "binding_limit", lambda **_: Limit("host", 0, 0, "here"))
    rng = np.random.default_rng(0)
    shown = ArraySignal(rng.integers(0, 5, 200, np.int32), 1.0, bank="images")
    eeg = ArraySignal(rng.normal(0, 10, (6000, 129)).astype("float32"), 100.0)
    apart, close = (
        Events(tuple(np.arange(2.0, 50, step)), (0.0,) * n, ("go",) * n) for step, n in ((4, 12), (2, 24))
    )
    source = ArraySource(
        {
            "a": ArrayRecording({"image": shown}),
            "apart": ArrayRecording({"eeg": eeg}, events=apart, fields={"of": "apart"}),
            "close": ArrayRecording({"eeg": eeg}, events=close, fields={"of": "close"}),
        },
        {"images": rng.integers(0, 255, (5, 120, 120, 3), dtype=np.uint8)},
    )
    with prepare(source, tmp_path / "store").store as store:
        images = store.windows(FixedWindows(signal="image", window_size_samples=1))
        if not images.can_be_read_directly():
            pytest.skip("temporary files cannot be read past the page cache here")
        assert not images.loader(4, mode="shuffled", memory="1 GB").is_direct
        for which, is_direct in (("apart", True), ("close", False)):
            spec = EventWindows(signal="eeg", anchor=("go",), trial_duration_s=2.5, where={"of": (which,)})
            trials = store.windows(spec)
            assert trials.loader(4, mode="shuffled", memory="1 GB").is_direct == is_direct


def test_rows_of_a_bank_that_were_looked_up_are_counted(tmp_path: Path) -> None:
    """Where every window shows five hundred small images, what is known of them is more than they are."""
    rng = np.random.default_rng(0)
    shown = ArraySignal(rng.integers(0, 5, 20_000, np.int32), 1.0, bank="images")
    bank = rng.integers(0, 255, (5, 4, 4), dtype=np.uint8)
    source = ArraySource({"a": ArrayRecording({"image": shown})}, {"images": bank})
    with prepare(source, tmp_path / "store").store as store:
        windows = store.windows(FixedWindows(signal="image", window_size_samples=500))
        loader = windows.loader(4, memory="200 MB", threads=2)
        assert_holds(loader)
        assert windows.found_bytes > windows.batch_bytes(1)


def test_where_not_even_one_window_fits_the_budget_must_grow(windows: Windows) -> None:
    """The figure that is named is enough for this batch size."""
    with pytest.raises(DoesNotFit) as caught:
        windows.loader(120, memory="1 KiB")
    found = re.search(r"Raise the memory budget to at least (\d+) MB", str(caught.value))
    assert found is not None
    windows.loader(120, memory=f"{found[1]} MB")


def test_a_budget_is_found_where_none_is_told(windows: Windows) -> None:
    """Without ``memory`` the budget is what this machine leaves, and says where that was read."""
    budget = windows.loader(32).budget
    assert "80%" in budget.origin
    assert budget.left_bytes >= 0
