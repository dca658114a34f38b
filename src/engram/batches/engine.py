"""The read engine: batches of an order, read ahead of who asks for them, in a memory that is bounded.

The future order is known. So the kernel is told early which bytes will be wanted, and reads them
without a thread of ours; threads copy, widen and lay them out into a few buffers that are used
again and again. This module decides what is read when, and into which buffer. What is in a
batch, its caller says; the bytes are ``engram.store.gather``'s.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from typing import Protocol, TypeAlias
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from engram.batches.batch import Batch
from engram.batches.reading import Reads
from engram.errors import StoreDamaged
from engram.store.gather import Ranges

__all__ = ["AHEAD_BATCHES", "SPARE_SLOTS", "Engine", "Sizes"]

AHEAD_BYTES = 32 * 10**6
"""What the kernel is asked to read ahead of the threads: some hundred windows, so that a disk has
its queue full (32 reads of 50 KB are 1.6 MB), and little beside the page cache of any machine."""

AHEAD_BATCHES = 8
"""Batches, beside those in the ring, that are looked up ahead: of small windows 32 MB would be thousands."""

SPARE_SLOTS = 2
"""Batches in a ring beside those in work: one in the consumer's hands, one ready. More do not make a
steady disk faster, and leave the processor's caches: 8 took a fifth more processor time than 3."""

_ENOUGH_READY, _GIVE_WAY_S = 2, 2e-3
"""Where so many batches are ready, a thread that is given memory back waits before it fills it. The
memory comes back in the moment in which the consumer begins its next step, and has most to do in Python:
without the wait a step of 20 ms took 3.6 % longer than from RAM, with it 0.6 %."""


class Source(Protocol):
    """What an engine reads from: windows of a store."""

    def find(self, numbers: Sequence[int]) -> Iterator[Reads]:
        """Say what has to be read for some batches, one after another."""
        ...

    def hint(self, ranges: Ranges) -> None:
        """Let the kernel read some of it ahead."""
        ...

    def fill(self, reads: Reads, buffer: NDArray[np.uint8], progress: Callable[[Ranges], None]) -> Batch:
        """Read a batch into a buffer, telling of every part of it that was read."""
        ...


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much an engine holds and how many threads it has."""

    n_slots: int
    """Batches in memory at once, the one in the consumer's hands included; at least 2."""
    slot_bytes: int
    """The most that the signals of one batch take."""
    n_threads: int
    """Threads that read; below ``n_slots``."""
    n_found: int = AHEAD_BATCHES
    """Batches that a source is asked about at once: of few windows each, many take hardly longer than one."""


class Engine:
    """Batches, read ahead.

    A batch owns its memory: nobody writes to it as long as one of its tensors, or an array over
    it, is alive. When the last is gone, its memory is used for a later batch. Who holds on to
    more batches than the ring has is given new memory, beside the ring's.

    Parameters
    ----------
    source
        What is read from.
    numbers
        Numbers of the batches, in the order in which they are wanted.
    sizes
        How much is held.

    Notes
    -----
    Every iteration is of its own, with threads and buffers of its own, which end with it: at the
    last batch, at an exception, or when the iterator is closed or dropped. After ``fork`` the
    child goes on with threads of its own.
    """

    def __init__(self, source: Source, numbers: Sequence[int], sizes: Sizes) -> None:
        self._source, self._numbers, self._sizes = source, numbers, sizes

    def __iter__(self) -> Iterator[Batch]:
        crew = _Crew(self._source, self._numbers, self._sizes)
        try:
            crew.start()
            for i in range(len(self._numbers)):
                if crew.process != os.getpid():  # a fork: the threads stayed with the parent
                    crew = _Crew(self._source, self._numbers[i:], self._sizes)
                    crew.start()
                # No name for the batch: it would outlive the consumer's own.
                yield crew.take(self._numbers[i])
        finally:
            crew.stop()


class _Slot:
    """Memory for one batch."""

    __slots__ = ("buffer",)

    def __init__(self, n_bytes: int) -> None:
        self.buffer = np.empty(n_bytes, np.uint8)


class _Lease:
    """A slot's memory in a batch's hands: lives as long as any array over it, then gives it back."""

    __slots__ = ("__array_struct__", "_crew", "_slot")

    def __init__(self, slot: _Slot, crew: _Crew) -> None:
        # Weak: a crew has batches that wait, and Python's collector sees no circle through an array.
        self._slot, self._crew = slot, ref(crew)
        # NumPy keeps a reference to whatever has this, as the base of every view.
        self.__array_struct__: object = slot.buffer.__array_struct__

    def __del__(self) -> None:
        if crew := self._crew():
            crew.give_back(self._slot)


_Result: TypeAlias = tuple[Batch, _Slot] | BaseException
"""What became of a batch: it, and whose memory it has, or why there is none."""


class _Crew:
    """The threads and buffers of one iteration."""

    def __init__(self, source: Source, numbers: Sequence[int], sizes: Sizes) -> None:
        self.process = os.getpid()
        self._source, self._sizes = source, sizes
        self._lock, self._looking_ahead = Lock(), Lock()
        self._waiting = iter(numbers)
        # Queues whose put may interrupt anything, itself too: batches are dropped at any time.
        self._done: SimpleQueue[tuple[int, _Result]] = SimpleQueue()
        self._early: dict[int, _Result] = {}
        self._ahead_bytes = 0
        self._ahead: Iterator[Ranges | None] = self._look_ahead(numbers)
        self._found: dict[int, Reads] = {}
        self._lost: Exception | None = None
        self._free: SimpleQueue[_Slot | None] = SimpleQueue()
        self._slots: set[_Slot] = set()
        self._handed: set[_Slot] = set()
        # The last one comes with the second batch: until it has the first, a loop still holds the last
        # batch of the pass before.
        self._n_slots, self._has_begun = min(sizes.n_slots, len(numbers)), False
        for _ in range(max(1, self._n_slots - 1)):
            self._add_slot()
        # Daemons: a program that ends in the middle of an epoch is not kept waiting.
        self._threads = [
            Thread(target=self._work, name=f"engram-read-{number}", daemon=True)
            for number in range(min(sizes.n_threads, len(numbers)))
        ]

    def start(self) -> None:
        """Let the threads begin; where this is interrupted, or there can be no more, ``stop`` is due."""
        for thread in self._threads:
            thread.start()

    def take(self, number: int) -> Batch:
        """Wait for a batch."""
        is_small = self._has_begun and len(self._slots) < self._n_slots
        if is_small or len(self._handed) >= len(self._slots):
            self._add_slot()  # or all memory is in the hands of the consumer, who wants one more
        self._has_begun = True
        while number not in self._early:
            done, result = self._done.get()
            self._early[done] = result
        result = self._early.pop(number)
        if isinstance(result, BaseException):
            try:
                raise result
            finally:
                del result  # or the error and this frame would keep each other
        batch, slot = result
        self._handed.add(slot)
        return batch

    def stop(
        self,
        is_ending: Callable[[], bool] = sys.is_finalizing,
        process: Callable[[], int] = os.getpid,
    ) -> None:
        """End the threads, wait until they have, and let go of all memory."""
        # Arguments: when the interpreter ends, this module's names may be gone first, and its threads are
        # stopped for good wherever they are.
        if is_ending() or self.process != process():
            return  # after a fork, they are the parent's
        self._waiting = iter(())
        self._free.put(None)
        if current_thread() in self._threads:
            return  # an iterator lost in a circle: the collector found it here, and waits for nobody
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        # Whoever keeps an error keeps the frames that it came through, and this with them.
        self._early, self._found, self._ahead, self._slots = {}, {}, iter(()), set()
        self._lost = None
        self._done, self._free = SimpleQueue(), SimpleQueue()
        self._free.put(None)  # for a thread that has not come to run yet: its start was interrupted

    def _add_slot(self) -> None:
        slot = _Slot(self._sizes.slot_bytes)
        self._slots.add(slot)
        self._free.put(slot)

    def give_back(self, slot: _Slot) -> None:
        """Use memory again that no batch has any more, if the ring lacks it."""
        if slot not in self._slots:
            return
        if len(self._slots) > self._n_slots:
            # In this order: whoever takes a batch meanwhile sees no memory that is in nobody's hands.
            self._slots.discard(slot)
            self._handed.discard(slot)
        else:
            self._handed.discard(slot)
            self._free.put(slot)

    def _work(self) -> None:
        while (slot := self._free.get()) is not None:
            if self._done.qsize() >= _ENOUGH_READY:
                time.sleep(_GIVE_WAY_S)
            if not self._fill_next(slot):
                return
            del slot  # while this thread waits, nobody may want it any more
        self._free.put(None)  # to the next: one for all, so that no second Ctrl-C comes between

    def _fill_next(self, slot: _Slot) -> bool:
        with self._lock:
            number = next(self._waiting, None)
        if number is None:
            return False
        try:
            self._done.put((number, self._fill(number, slot)))
        except BaseException as error:  # noqa: BLE001 - the consumer's to see, whatever it is
            self._done.put((number, error))
        return True

    def _fill(self, number: int, slot: _Slot) -> tuple[Batch, _Slot]:
        reads = self._take_found(number)
        return self._source.fill(reads, np.asarray(_Lease(slot, self)), self._read), slot

    def _take_found(self, number: int) -> Reads:
        if number not in self._found:
            with self._looking_ahead:
                while number not in self._found and self._hint_next():
                    pass
        found = self._found.pop(number, None)
        if found is None:
            assert self._lost is not None, "every batch is found, or one before it was not"
            raise self._lost
        return found

    def _read(self, ranges: Ranges) -> None:
        """Look as far ahead again, after some of it was read."""
        with self._lock:
            self._ahead_bytes -= ranges.n_bytes
        # One thread looks ahead; meanwhile the others read on.
        if self._looking_ahead.acquire(blocking=False):
            try:
                while self._ahead_bytes < AHEAD_BYTES and len(self._found) < AHEAD_BATCHES:
                    if not self._hint_next():
                        break
            finally:
                self._looking_ahead.release()

    def _hint_next(self) -> bool:
        try:
            ranges = next(self._ahead)
        except StopIteration:
            return False
        if ranges is None:
            return True
        with self._lock:
            self._ahead_bytes += ranges.n_bytes
        with suppress(StoreDamaged):  # told in its turn, when the batch is read
            self._source.hint(ranges)
        return True

    def _look_ahead(self, numbers: Sequence[int]) -> Iterator[Ranges | None]:
        """Find batch after batch, and give what to read of it; None of one without rows: a place to stop."""
        for first in range(0, len(numbers), self._sizes.n_found):
            some = numbers[first : first + self._sizes.n_found]
            reads = self._source.find(some)
            for number in some:
                try:
                    found = self._found[number] = next(reads)
                except Exception as error:  # noqa: BLE001 - raised in the place of this batch
                    self._lost = error
                    return
                yield from found.ranges if len(found) else (None,)
