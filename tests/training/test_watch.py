"""Memory and signals raise flags, and nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest

from engram.errors import MemoryExceeded
from engram.memory import Limit, Usage
from engram.training.watch import MemoryWatch, heed_signals

LIMIT = Limit("cgroup v2", allowed_bytes=1000, used_bytes=100, where="memory.max")


def make_watch(*bounds: int, exact: int = 0, share: float = 0.8) -> MemoryWatch:
    """Watch scripted readings; the first one is taken when the watch is made."""
    readings = iter(bounds)

    def bound() -> Usage:
        return Usage(next(readings, bounds[-1]), 1, "RSS")

    return MemoryWatch(share, None, LIMIT, bound, lambda: Usage(exact, 1, "PSS"))


def test_what_others_hold_is_not_ours_to_use() -> None:
    """Of 1000 bytes with 40 held by others, 80 % leave 760."""
    assert make_watch(60).allowed_bytes == 760


def test_a_bound_above_what_others_hold_leaves_the_whole_share() -> None:
    """The bound counts shared pages once per process: it may exceed what the limit counts."""
    assert make_watch(300).allowed_bytes == 800


def test_a_limit_that_others_fill_leaves_nothing() -> None:
    """Then the first reading stops the training."""
    assert MemoryWatch(0.05, None, LIMIT, lambda: Usage(1, 1, "RSS")).allowed_bytes == 0


def test_only_what_is_above_is_exceeded() -> None:
    """At the share itself, the training goes on."""
    watch = make_watch(100, 800, 801, exact=801)
    assert watch.line(time_s=0.0, step=0).used_bytes == 800
    assert not watch.is_exceeded
    watch.line(time_s=0.0, step=1)
    assert watch.is_exceeded


def test_a_bound_that_is_too_high_is_measured() -> None:
    """Pages that forked workers share stop no training."""
    watch = make_watch(100, 900, exact=500)
    assert watch.line(time_s=1.0, step=3).used_bytes == 500
    assert not watch.is_exceeded


def test_what_a_step_held_for_a_moment_is_seen() -> None:
    """The line after it tells; the line after that no longer does."""
    watch = MemoryWatch(1.0, limit=Limit("cgroup v2", 1 << 40, 0, "memory.max"))
    with watch.sampling():
        before = watch.line(time_s=0.0, step=0).used_bytes
        block = np.ones(64 << 20, np.uint8)
        time.sleep(0.3)
        del block
        assert watch.line(time_s=1.0, step=1).used_bytes - before > 60 << 20
        assert watch.line(time_s=2.0, step=2).used_bytes - before < 60 << 20


def test_a_bound_that_is_too_high_for_a_moment_is_measured_in_that_moment() -> None:
    """A child that was forked and is gone shared its pages: 950 by the bound, of which 550 were real."""
    watch = make_watch(100, 950, 120, exact=550)
    with watch.sampling():
        assert watch.line(time_s=0.0, step=1).used_bytes == 550


def test_the_error_says_where_with_which_figures_and_what_to_do() -> None:
    """The figures are attributes too."""
    watch = make_watch(100, 900, exact=900)
    watch.line(time_s=0.0, step=5)
    error = watch.error("after optimizer step 5")
    assert isinstance(error, MemoryExceeded)
    assert (error.used_bytes, error.allowed_bytes) == (900, 800)
    for words in ("80%", "cgroup v2", "memory.max", "after optimizer step 5", "larger limit", "900 B"):
        assert words in str(error)


def test_the_limit_of_this_machine_is_the_default() -> None:
    """A real reading is below a real limit."""
    watch = MemoryWatch(1.0)
    assert watch.line(time_s=0.0, step=0).used_bytes > 1 << 20
    assert not watch.is_exceeded


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_raises_a_flag(number: signal.Signals) -> None:
    """The first one counts; handlers are put back."""
    before = signal.getsignal(number)
    with heed_signals() as watch:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert watch.received is number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts_at_once() -> None:
    """Whoever presses twice does not want to wait for the next step."""
    with heed_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_signals_do_what_they_did() -> None:
    """Python lets only the main thread have handlers."""
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def watch_here() -> None:
        with heed_signals() as watch:
            seen.append((watch.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=watch_here)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
