"""What may end a training early: memory near its limit, and signals from outside.

This module decides what counts as too much memory and which signals are heeded; both only
raise a flag. What is done about it, and when, is ``engram.training.fit``'s: a checkpoint at
the next step, then a stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from engram.errors import MemoryExceeded
from engram.ledger import MemoryLine
from engram.memory import Limit, PeakWatch, Usage, binding_limit, bound_usage, read_usage, watch_peak
from engram.units import format_bytes, parse_bytes

__all__ = ["MemoryWatch", "SignalWatch", "heed_signals"]


class MemoryWatch:
    """Compares this process tree's memory with a share of the limit that binds.

    What others held under the same limit when the watch was made (a notebook's other kernels, the
    page tables of a container) is taken as theirs to keep.

    Parameters
    ----------
    share
        Of the limit.
    told
        What the training was told to keep within, which counts if it is less; None: the share alone.
    limit
        The limit; None for the one that binds here.
    bound
        Bounds the usage from above, cheaply.
    read
        Measures it exactly, where the bound is too high: memory that forked processes share counts
        once per process in the bound.

    Examples
    --------
    >>> limit = Limit("cgroup v2", allowed_bytes=1000, used_bytes=300, where="memory.max")
    >>> readings = iter([Usage(200, 1, "RSS"), Usage(690, 1, "RSS"), Usage(710, 1, "RSS")])
    >>> watch = MemoryWatch(0.8, None, limit, lambda: next(readings), lambda: Usage(701, 1, "PSS"))
    >>> watch.allowed_bytes
    700
    >>> [watch.line(time_s=0.0, step=step).used_bytes for step in (1, 2)]
    [690, 701]
    >>> watch.is_exceeded
    True
    """

    def __init__(
        self,
        share: float,
        told: int | str | None = None,
        limit: Limit | None = None,
        bound: Callable[[], Usage] = bound_usage,
        read: Callable[[], Usage] = read_usage,
    ) -> None:
        self.limit = binding_limit() if limit is None else limit
        self._bound = bound
        self._read = read
        others_bytes = max(0, self.limit.used_bytes - bound().unreclaimable_bytes)
        by_share = max(0, int(share * self.limit.allowed_bytes) - others_bytes)
        self.allowed_bytes = by_share if told is None else min(by_share, parse_bytes(told))
        """Memory of this process tree at which the training stops."""
        self._is_told = self.allowed_bytes < by_share
        self.used_bytes = 0
        """What the last line tells: the highest since the one before, or a reading."""
        self._share = share
        self._sampled: PeakWatch | None = None

    @property
    def is_exceeded(self) -> bool:
        """True if what the last line tells was above what is allowed."""
        return self.used_bytes > self.allowed_bytes

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Read memory all the while, so that a line tells of what came and went since the line before it.

        Within one step, convolutions may hold eight times its batch (oneDNN's layouts).
        """
        with watch_peak(read=self._measure) as sampled:
            self._sampled = sampled
            try:
                yield
            finally:
                self._sampled = None

    def line(self, *, time_s: float, step: int) -> MemoryLine:
        """Take a reading: the highest since the last one within `sampling`.

        Parameters
        ----------
        time_s, step
            When, for the ledger.
        """
        peak = self._measure() if self._sampled is None else self._sampled.restart()
        self.used_bytes = peak.unreclaimable_bytes
        device_bytes = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call] # unannotated there
        return MemoryLine(time_s, step, self.used_bytes, device_bytes)

    def _measure(self) -> Usage:
        """Read exactly, at once, what the bound finds too much: a forked child is soon gone."""
        usage = self._bound()
        return usage if usage.unreclaimable_bytes <= self.allowed_bytes else self._read()

    def error(self, where: str) -> MemoryExceeded:
        """Say what was exceeded, and what to do.

        Parameters
        ----------
        where
            In the training, in words.
        """
        limit = f"{self.limit.kind} limit of {format_bytes(self.limit.allowed_bytes)}"
        what = (
            "what it was given" if self._is_told else f"{self._share:.0%} of the {limit} ({self.limit.where})"
        )
        larger = "with a larger memory" if self._is_told else "under a larger limit"
        return MemoryExceeded(
            f"The training's memory passed {what} {where}. What was trained is saved: train in the same "
            f"folder again {larger}",
            used_bytes=self.used_bytes,
            allowed_bytes=self.allowed_bytes,
        )


class SignalWatch:
    """The first signal that asked for a stop. Made by `heed_signals`."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        """The signal, or None."""


@contextmanager
def heed_signals() -> Iterator[SignalWatch]:
    """Let SIGINT and SIGTERM ask for a stop at the next step instead of ending the process.

    A second SIGINT interrupts at once. Handlers are put back afterwards. Only a process's main thread
    may have handlers: in any other, signals do what they did.

    Notes
    -----
    Lightning has a handler of its own for SIGTERM, which ends a training after the next batch, also
    inside an accumulation. To replace it, enter after Lightning has begun.

    Examples
    --------
    >>> import os
    >>> with heed_signals() as watch:
    ...     os.kill(os.getpid(), signal.SIGTERM)
    ...     watch.received.name
    'SIGTERM'
    """
    watch = SignalWatch()

    def note(number: int, _frame: FrameType | None) -> None:
        if watch.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        watch.received = watch.received or signal.Signals(number)

    if threading.current_thread() is not threading.main_thread():
        yield watch
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield watch
    finally:
        for number, handler in before.items():
            # None: a handler that C code installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
