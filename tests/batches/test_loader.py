"""The loader: batches in order, from any place, within a budget."""

from __future__ import annotations

import json
import multiprocessing
import re
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engram.batches import loader as loader_module
from engram.batches.batch import Batch
from engram.batches.loader import Loader
from engram.batches.windows import Windows
from engram.errors import DoesNotFit, InputError
from engram.memory import Usage
from engram.store.reader import Store
from engram.windows.order import Cursor, Mode
from engram.windows.spec import FixedWindows
from engram.windows.targets import RecordingColumn

SPEC = FixedWindows(signal="eeg", window_size_s=0.5)


@pytest.fixture
def windows(trials: Store) -> Windows:
    """120 windows of 4 channels and 50 samples, 40 of each subject."""
    return trials.windows(SPEC, RecordingColumn("age"))


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
    with pytest.raises(InputError):
        loader.set_epoch(-1)


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
    with pytest.raises(InputError, match="no rank 3 among 3"):
        windows.loader(32, rank=3, world=3)


def test_an_order_of_other_windows_is_refused(windows: Windows) -> None:
    """A loader takes the order of its own windows only."""
    fewer = Windows(windows.store, windows.index.take(np.arange(len(windows)) > 0))
    with pytest.raises(InputError, match="not of these 119"):
        Loader(fewer, windows.order(8))


def _digest(loader: Loader) -> list[tuple[list[int], float]]:
    return [(batch.numbers.tolist(), float(batch.signals["eeg"].sum())) for batch in loader]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # fork is the point
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
    """Index, order, two batches and buffers are lines, and a batch is no larger than its line."""
    loader = windows.loader(32, mode="groups", by="subject", memory="50 MiB")
    lines = {line.name: line.n_bytes for line in loader.budget.spendings}
    batch: Batch = next(iter(loader))

    assert list(lines) == [
        "index of windows", "order", "two batches of 32 windows", "buffers while one is read"
    ]  # fmt: skip
    assert lines["index of windows"] == windows.index.n_bytes
    assert lines["order"] == loader.order.n_bytes > 4 * len(windows)
    # A target may take 8 bytes, and takes 4 here.
    assert lines["two batches of 32 windows"] == 2 * (batch.n_bytes + 4 * 32)


def test_what_the_process_holds_counts_where_all_there_is_is_shared(
    windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``memory``, what the process holds is a line, of which index and order are a part."""
    _hold(100 << 20, monkeypatch)
    lines = {line.name: line.n_bytes for line in windows.loader(32).budget.spendings}
    assert lines["this process"] + lines["index of windows"] + lines["order"] == 100 << 20


@pytest.mark.parametrize("world", [1, 2])
def test_what_does_not_fit_names_the_batch_size_that_does(windows: Windows, world: int) -> None:
    """The remedy can be followed: the batch size named fits, one more window per rank does not."""
    with pytest.raises(DoesNotFit, match=f"two batches of {120 // world} windows") as caught:
        windows.loader(120, memory="76 KiB", world=world)
    found = re.search(r"Use batch_size=(\d+) or less", str(caught.value))
    assert found is not None
    batch_size = int(found[1])

    assert 0 < batch_size < 120
    assert caught.value.needed_bytes > caught.value.allowed_bytes == 76 << 10
    windows.loader(batch_size, memory="76 KiB", world=world)
    with pytest.raises(DoesNotFit):
        windows.loader(batch_size + 1, memory="76 KiB", world=world)


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
