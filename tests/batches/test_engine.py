"""The read engine: batches read ahead into a few buffers that are used again and again."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Event, Thread, Timer
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram.batches import engine as module
from engram.batches.batch import Batch
from engram.batches.engine import AHEAD_BATCHES, AHEAD_BYTES, Engine, Sizes
from engram.batches.reading import Reads, SignalReads
from engram.errors import StoreDamaged
from engram.store.backend import Part
from engram.store.gather import Ranges
from engram.store.grid import Grid

MIB = 1 << 20


class Failed(Exception):
    """What a source fails with: where, and at which batch."""


class Numbers:
    """A source whose batch n is the number n, over and over; it notes what it is asked for."""

    def __init__(
        self,
        *,
        fails: Sequence[tuple[str, int]] = (),
        empty: Sequence[int] = (),
        range_bytes: Sequence[int] = (),
        before_fill: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.fails, self.empty, self.before_fill = fails, empty, before_fill
        part = Part("part", "x", Grid(10**12, (), "uint8"))
        self.ranges = [
            Ranges([part], "exact", np.array([[0], [0], [n], [0], [0]], np.int64)) for n in range_bytes
        ]
        self.noted: list[tuple[str, int]] = []

    def find(self, numbers: Sequence[int]) -> Iterator[Reads]:
        """Name the number, once for every row."""
        for number in numbers:
            self._note("find", number)
            rows = np.full(0 if number in self.empty else 2, number)
            signal = SignalReads(tuple(self.ranges), rows, number, (), (), "uint8", is_channels=False)
            yield Reads(rows, {"x": signal}, 2)

    def hint(self, ranges: Ranges) -> None:
        """Note it."""
        self._note("hint", ranges.n_bytes)

    def fill(self, reads: Reads, buffer: NDArray[np.uint8], progress: Callable[[Ranges], None]) -> Batch:
        """Write the number all over the buffer."""
        if not len(reads):
            self._note("fill", -1)
            rows = torch.from_numpy(buffer)[:0]
            return Batch({"x": rows}, {}, None, torch.from_numpy(reads.numbers), 2)
        number = int(reads.numbers[0])
        self.before_fill(number)
        self._note("fill", number)
        for ranges in reads.ranges:
            self._note("read", ranges.n_bytes)
            progress(ranges)
        values = buffer[: len(buffer) // 16 * 16].view(np.int64).reshape(2, -1)
        values[:] = number
        return Batch({"x": torch.from_numpy(values)}, {}, None, torch.from_numpy(reads.numbers), 2)

    def _note(self, what: str, number: int) -> None:
        self.noted.append((what, number))
        if (what, number) in self.fails:
            raise Failed(what, number)

    def of(self, what: str) -> list[int]:
        """Give the numbers noted of one kind."""
        return [number for kind, number in self.noted if kind == what]


def make(
    n_batches: int = 30, *, n_slots: int = 4, n_threads: int = 2, n_bytes: int = 64, **source: Any
) -> Engine:
    """Make an engine over batches of so many numbers."""
    return Engine(Numbers(**source), range(n_batches), Sizes(n_slots, n_bytes, n_threads))


def read(batches: Any) -> list[int]:
    """Give the numbers that batches hold; each in all of its values, or not at all."""
    return [number_of(batch) for batch in batches]


def number_of(batch: Batch) -> int:
    """Give the number that a batch holds in all of its values."""
    values = batch.signals["x"].numpy()
    (number,) = {int(values.min()), int(values.max()), *batch.numbers.tolist()}
    return int(number)


def readers() -> list[Thread]:
    """List the threads that read, of all engines."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("engram-read-")]


@contextmanager
def allocated() -> Iterator[Callable[[], tuple[int, int]]]:
    """Tell how many bytes are held since the start, and were at most; the collector frees nothing."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield tracemalloc.get_traced_memory
    finally:
        tracemalloc.stop()
        gc.enable()


# What comes, and in which order.


@given(
    numbers=st.builds(range, st.integers(0, 5), st.integers(0, 60), st.integers(1, 4)),
    n_slots=st.integers(2, 6),
    n_threads=st.integers(1, 5),
)
def test_batches_come_in_order(numbers: range, n_slots: int, n_threads: int) -> None:
    """Each once, whatever the numbers, slots and threads; none of none."""
    engine = Engine(Numbers(), numbers, Sizes(n_slots, 64, n_threads))
    assert read(engine) == list(numbers)
    assert not readers()


def test_every_pass_is_of_its_own() -> None:
    """An engine may be iterated again, and by two at once."""
    engine = make()
    assert read(engine) == read(engine)
    for one, other in zip(engine, engine, strict=True):
        assert number_of(one) == number_of(other)
    assert read(one for pair in zip(make(), make(7), strict=False) for one in pair) == [
        number for number in range(7) for _ in range(2)
    ]


def test_a_batch_without_rows_comes_in_its_turn() -> None:
    """A rank may have none of a batch; the slot that it came in is not lost."""
    empty = [n for n in range(30) if n % 3]
    lengths = [len(batch.numbers) for batch in make(n_slots=2, n_threads=1, empty=empty)]
    assert lengths == [0 if n in empty else 2 for n in range(30)]


# Whose memory it is.

KEEPERS: dict[str, Callable[[Batch], Any]] = {
    "the batch": lambda batch: batch,
    "a tensor": lambda batch: batch.signals["x"],
    "a view of a tensor": lambda batch: batch.signals["x"][0, :2],
    "an array": lambda batch: batch.signals["x"].numpy(),
    "a view of an array": lambda batch: batch.signals["x"][1, 1:3].numpy()[::-1],
    "a buffer": lambda batch: memoryview(batch.signals["x"].numpy().data),
    "a flat tensor": lambda batch: batch.signals["x"].detach().reshape(-1)[3:],
}


def values_of(thing: Any) -> set[int]:
    """Give the values of whatever was kept of a batch."""
    return {*np.asarray(thing.signals["x"] if isinstance(thing, Batch) else thing).ravel().tolist()}


@settings(max_examples=60)
@given(data=st.data(), n_slots=st.integers(2, 5), n_threads=st.integers(1, 3))
def test_what_is_held_is_never_written_to(data: st.DataObject, n_slots: int, n_threads: int) -> None:
    """Any tensor, array or view over a batch, however many are held for however long."""
    held: list[tuple[int, Any]] = []
    for number, batch in enumerate(make(40, n_slots=n_slots, n_threads=n_threads)):
        held.append((number, KEEPERS[data.draw(st.sampled_from(sorted(KEEPERS)))](batch)))
        del batch
        for _ in range(data.draw(st.integers(0, 3))):
            if held:
                held.pop(data.draw(st.integers(0, len(held) - 1)))
        for kept, thing in held:
            assert values_of(thing) == {kept}
    for kept, thing in held:  # also when the threads are gone
        assert values_of(thing) == {kept}


def test_a_list_of_all_batches_holds_each() -> None:
    """Who keeps every batch is given memory for every one."""
    batches = list(make(30, n_slots=2))
    assert read(batches) == list(range(30))
    assert len({batch.signals["x"].data_ptr() for batch in batches}) == 30


def in_the_loop(batch: list[Any]) -> None:
    """Let go of a batch here and now."""
    batch.clear()


def in_a_thread(batch: list[Any]) -> None:
    """Let go of a batch in another thread."""
    thread = Thread(target=batch.clear)
    thread.start()
    thread.join()


def in_a_circle(batch: list[Any]) -> None:
    """Leave a batch to the collector."""
    batch.append(circle := [batch[0]])
    circle.append(circle)
    batch.clear()
    del circle
    gc.collect()


@pytest.mark.parametrize("drop", [in_the_loop, in_a_thread, in_a_circle])
def test_memory_that_was_let_go_of_is_used_again(drop: Callable[[list[Any]], None]) -> None:
    """Wherever a batch is dropped, the ring is all that is ever allocated."""
    with allocated() as memory:
        passing = iter(make(n_slots=4, n_bytes=MIB))
        for number in range(12):
            batch: list[Any] = [next(passing)]
            assert number_of(batch[0]) == number
            drop(batch)
        passing.close()  # type: ignore[attr-defined]  # a generator
        held_bytes, peak_bytes = memory()
    assert 3 * MIB <= peak_bytes <= 4.2 * MIB
    assert held_bytes < MIB / 2


def test_memory_beyond_the_ring_is_given_back() -> None:
    """Who held ten batches and lets them go is back at the ring's size, and stays there."""
    with allocated() as memory:
        passing = iter(make(60, n_slots=4, n_bytes=MIB))
        held = [next(passing) for _ in range(10)]
        assert 10 * MIB <= memory()[0] <= 14.2 * MIB
        held.clear()
        assert memory()[0] <= 4.2 * MIB
        for _ in range(10):
            next(passing)
        assert memory()[0] <= 4.2 * MIB
        passing.close()  # type: ignore[attr-defined]  # a generator


def test_others_may_let_go_of_what_is_beyond_the_ring() -> None:
    """While the next batch is taken, any number of them: none is waited for that nobody reads."""
    handed: SimpleQueue[Any] = SimpleQueue()

    def let_go() -> None:
        while (batches := handed.get()) is not None:
            batches.clear()

    thread = Thread(target=let_go)
    thread.start()
    held: list[Any] = []
    for number, batch in enumerate(make(2000, n_slots=2)):
        assert number_of(batch) == number
        held.append(batch)
        del batch
        if len(held) == 1 + number % 5:
            handed.put(held)
            held = []
    handed.put(None)
    thread.join()
    assert number == 1999


def test_a_short_pass_has_no_more_slots_and_threads_than_batches() -> None:
    """Two batches need no ring of six."""
    with allocated() as memory:
        passing = iter(make(2, n_slots=6, n_threads=5, n_bytes=MIB))
        next(passing)
        assert len(readers()) <= 2
        next(passing)
        assert memory()[1] <= 2.2 * MIB
        passing.close()  # type: ignore[attr-defined]  # a generator


def broken_off(engine: Engine) -> None:
    """Look at one batch."""
    for _ in engine:
        break


def failed_in_the_consumer(engine: Engine) -> None:
    """Fail with a batch in hand."""

    def consume() -> None:
        for batch in engine:
            number_of(batch) / 0

    with pytest.raises(ZeroDivisionError):
        consume()


def closed(engine: Engine) -> None:
    """Close the iterator, and keep it."""
    passing: Any = iter(engine)
    next(passing)
    passing.close()
    assert not readers()


def dropped(engine: Engine) -> None:
    """Drop the iterator."""
    passing = iter(engine)
    next(passing)
    del passing
    assert not readers()


def never_begun(engine: Engine) -> None:
    """Make an iterator and use it not."""
    passing = iter(engine)
    assert not readers()
    del passing


def kept_at_its_end(engine: Engine) -> None:
    """Keep the iterator after its last batch."""
    passing = iter(engine)
    read(passing)
    assert not readers()


@pytest.mark.parametrize(
    "use", [broken_off, failed_in_the_consumer, closed, dropped, never_begun, kept_at_its_end, read]
)
def test_nothing_is_left_of_a_pass(use: Callable[[Engine], Any]) -> None:
    """No thread and no memory, however it ended, and without the collector."""
    with allocated() as memory:
        use(make(n_bytes=MIB))
        assert not readers()
        assert memory()[0] < MIB / 2


class Refused(Thread):
    """The second one cannot be started, as where a limit of processes is reached."""

    def start(self) -> None:
        """Start the first one."""
        if self.name.endswith("1"):
            raise RuntimeError("can't start new thread")
        super().start()


class Interrupted(Thread):
    """Ctrl-C comes when the second one runs already, and its start has not come back."""

    def start(self) -> None:
        """Start it."""
        super().start()
        if self.name.endswith("1"):
            raise KeyboardInterrupt


class Overtaken(Thread):
    """Ctrl-C comes before the second one has come to run; then it does."""

    def start(self) -> None:
        """Start it later."""
        if self.name.endswith("1"):
            Timer(0.05, super().start).start()
            raise KeyboardInterrupt
        super().start()


@pytest.mark.parametrize("kind", [Refused, Interrupted, Overtaken])
def test_nothing_is_left_of_a_pass_that_could_not_begin(
    kind: type[Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever starts some threads of several ends those."""
    monkeypatch.setattr(module, "Thread", kind)
    with allocated() as memory:
        passing = iter(make(n_bytes=MIB, n_threads=3))
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            next(passing)
        time.sleep(0.2 if kind is Overtaken else 0)
        assert not readers()
        assert memory()[0] < MIB / 2


def test_a_batch_that_outlives_its_pass_keeps_its_own_memory() -> None:
    """And not that of the others."""
    with allocated() as memory:
        for batch in make(n_bytes=MIB):
            if number_of(batch) == 3:
                break
        assert MIB <= memory()[0] < 1.5 * MIB
        assert number_of(batch) == 3


def test_an_error_that_is_kept_keeps_little() -> None:
    """Who keeps an error keeps what it came through, and not the ring; the collector frees that too."""
    with allocated() as memory:
        with pytest.raises(Failed) as caught:
            read(make(n_slots=8, n_threads=1, n_bytes=MIB, fails=[("fill", 7)]))
        assert memory()[0] < 4 * MIB
        del caught
        gc.collect()
        assert memory()[0] < MIB / 2


def test_an_iterator_lost_in_a_circle_may_be_found_by_its_own_thread() -> None:
    """The collector runs in any thread: it ends the pass from there, waits for nobody and leaves nothing."""
    is_lost = Event()

    def collect(number: int) -> None:
        if number == 1:
            is_lost.wait(60)
            gc.collect()

    with allocated() as memory:
        circle: list[Any] = [iter(make(n_slots=3, n_bytes=MIB, before_fill=collect))]
        circle.append(circle)
        assert number_of(next(circle[0])) == 0
        threads = readers()
        assert threads
        del circle
        is_lost.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        del threads, thread
        gc.collect()
        assert memory()[0] < MIB / 2


# What fails.


@settings(max_examples=60)
@given(
    fails=st.lists(st.tuples(st.sampled_from(["find", "fill"]), st.integers(0, 25)), min_size=1, max_size=3),
    n_slots=st.integers(2, 6),
    n_threads=st.integers(1, 4),
)
def test_an_error_comes_in_the_place_of_its_batch(
    fails: list[tuple[str, int]], n_slots: int, n_threads: int
) -> None:
    """All batches before are right; of several errors the first counts; then the pass is over."""
    passing = iter(make(20, n_slots=n_slots, n_threads=n_threads, fails=fails))
    # What is found wrong is found before it is read.
    first = min(number for _, number in fails)
    assert [number_of(next(passing)) for _ in range(min(first, 20))] == list(range(min(first, 20)))
    if first < 20:
        with pytest.raises(Failed) as caught:
            next(passing)
        assert caught.value.args == (min(what for what, number in fails if number == first), first) or (
            caught.value.args == ("find", first)
        )
    with pytest.raises(StopIteration):
        next(passing)
    assert not readers()


def test_a_hint_that_fails_is_not_told() -> None:
    """What is damaged is told by whoever reads it."""

    class Damaged(Numbers):
        def hint(self, ranges: Ranges) -> None:
            raise StoreDamaged("gone")

    engine = Engine(Damaged(range_bytes=[100]), range(20), Sizes(3, 64, 2))
    assert read(engine) == list(range(20))


# How far ahead.


def test_no_more_is_read_ahead_than_the_ring_holds() -> None:
    """With one batch in hand, the others of the ring are read and no more."""
    source = Numbers()
    passing: Any = iter(Engine(source, range(30), Sizes(4, 64, 2)))
    batch = next(passing)
    passing.close()
    assert source.of("fill") == list(range(len(source.of("fill"))))
    assert len(source.of("fill")) <= 4
    assert number_of(batch) == 0


def test_batches_without_rows_are_read_no_further_ahead() -> None:
    """A rank that has rows of none, as in batches of fewer windows than ranks, holds no more for it."""
    source = Numbers(empty=range(1000))
    engine = Engine(source, range(1000), Sizes(4, 64, 2))
    passing: Any = iter(engine)
    with allocated() as memory:
        batch = next(passing)
        passing.close()
        assert not len(batch.numbers)
        assert len(source.of("fill")) <= 4
        assert len(source.of("find")) <= 4 + AHEAD_BATCHES
        assert memory()[1] < MIB / 4
    assert [len(batch.numbers) for batch in engine] == [0] * 1000


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize(
    "range_bytes",
    [[10], [3 * 10**6] * 2, [AHEAD_BYTES] * 4, [10**12]],
    ids=["small", "middling", "large ranges", "larger than all"],
)
def test_the_kernel_is_asked_for_some_batches_ahead(range_bytes: list[int], n_threads: int) -> None:
    """Of small batches so many ahead, of large ones so many bytes; by one thread all that it reads."""
    source = Numbers(range_bytes=range_bytes)
    assert read(Engine(source, range(40), Sizes(n_threads + 2, 64, n_threads))) == list(range(40))

    assert source.of("hint") == range_bytes * 40
    assert source.of("find") == list(range(40))
    # What is asked for and not yet read, whenever something is read.
    waiting_bytes, each = 0, []
    for what, number in source.noted:
        if what in ("hint", "read"):
            waiting_bytes += number if what == "hint" else -number
            each.append(waiting_bytes)
    of_batch = sum(range_bytes)
    assert max(each) >= min(AHEAD_BYTES, AHEAD_BATCHES * of_batch)
    assert max(each) < AHEAD_BYTES + max(range_bytes) + (n_threads - 1) * of_batch
    assert max(each) <= (AHEAD_BATCHES + 1) * of_batch + n_threads * of_batch
    assert n_threads > 1 or min(each) >= 0


def test_a_thread_gives_way_where_enough_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer has just begun its step; who has but one batch ready is not kept waiting."""
    waits: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    assert read(make(20, n_slots=2, n_threads=1)) == list(range(20))
    assert not waits
    monkeypatch.setattr(module, "_ENOUGH_READY", 0)  # as if there always were
    assert read(make(20, n_slots=2, n_threads=1)) == list(range(20))
    assert len(waits) >= 20
    assert set(waits) == {2e-3}


def test_a_dropped_batch_makes_room_for_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is too much is given up only if no thread was faster to take it."""

    class Fast(SimpleQueue[Any]):
        def empty(self) -> bool:
            """Say that there is something, which is gone when it is asked for."""
            return False

    monkeypatch.setattr(module, "SimpleQueue", Fast)
    held = []
    for number, batch in enumerate(make(30, n_slots=2)):
        held.append(batch)
        if number % 5 == 4:
            held.clear()
    assert number_of(batch) == 29


# Fork.


def _send_rest(passing: Iterator[Batch], pipe: Any) -> None:
    pipe.send(read(passing))


@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)  # fork is the point
def test_a_child_goes_on_with_its_parent_s_iterator() -> None:
    """After a fork in the middle both get the same rest, each by threads of its own; held batches stay."""
    context = multiprocessing.get_context("fork")
    passing = iter(make(40))
    held = [next(passing) for _ in range(5)]
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_send_rest, args=(passing, theirs))
    child.start()
    assert mine.poll(60)
    assert mine.recv() == list(range(5, 40))
    child.join(60)
    assert child.exitcode == 0
    child.close()
    mine.close()
    theirs.close()
    assert read(passing) == list(range(5, 40))
    assert read(held) == list(range(5))
