"""Chain: preprocessing steps over one signal of a recording, block by block.

This module decides in which blocks a signal is computed, so that every array on the way
stays near a size, and what that takes in memory, before a sample is read. What a step does
to a block is left to ``steps.py``; what becomes of the blocks, to ``ingest.py``.

Blocks are pulled: for each one the chain asks its stages, last to first, which samples
they depend on, reads that range and runs it through. Halos are read and computed again
with every block, which costs a share of halo / block in time and keeps no state.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.errors import SourceError
from engram.preparation.steps import SMALL_BYTES, Scan, ScanningStep, Stage, Step, measured
from engram.recordings.recording import Recording, Signal, signal_named

__all__ = ["Chain", "bind", "predict_bytes"]

_Spans = tuple[tuple[int, int], ...]
"""Samples [start, stop) of the source, then of what each stage gives; the last is the block."""


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Steps bound to one signal of an open recording; may be walked through again.

    It belongs to the process and thread that opened the recording.
    """

    signal: Signal
    """What comes out: (time, channel) float64, or the recording's own where there are no steps."""
    peak_bytes: int
    """Most memory that ``bind`` and ``blocks`` hold at a time, the last block given included.

    What the reader of the recording holds beyond the samples it returns is not in it."""
    _recording: Recording
    _source: Signal
    _stages: tuple[Stage, ...]
    _blocks: tuple[_Block, ...]

    def blocks(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Walk through the result once, in order, every sample once.

        Yields
        ------
        tuple of int and ndarray
            Number of the block's first sample, and (time, channel) float64 samples, or the
            recording's own shape and dtype where there are no steps. Owned by the caller.

        Raises
        ------
        SourceError
            If the recording cannot be read, or a step cannot take its samples.
        """
        for spans, x in self._reads():
            if self._stages:
                x = np.asarray(x, np.float64)  # noqa: PLW2901 - another name would keep the block alive
            for stage, span in zip(self._stages, spans[1:], strict=True):
                x = stage.apply(x, *span)  # noqa: PLW2901 - as above
            yield spans[-1][0], x

    def _reads(self) -> Iterator[tuple[_Spans, NDArray[Any]]]:
        """Read what each block needs, without holding on to what was read."""
        name = self._source.name
        if any(block.spans[0] != block.spans[-1] for block in self._blocks):
            return ((block.spans, self._recording.read(name, *block.spans[0])) for block in self._blocks)
        # Where no block has a halo nothing is read twice, and the recording may walk in the
        # way that suits its file.
        longest = max((block.stop - block.start for block in self._blocks), default=1)
        return map(self._spanned, self._recording.blocks(name, longest * self._source.array.sample_bytes))

    def _spanned(self, block: tuple[int, NDArray[Any]]) -> tuple[_Spans, NDArray[Any]]:
        start, x = block
        return ((start, start + len(x)),) * (len(self._stages) + 1), x


@dataclass(frozen=True, slots=True)
class _Block:
    """One block of the result and what it is computed from."""

    spans: _Spans

    @property
    def start(self) -> int:
        return self.spans[-1][0]

    @property
    def stop(self) -> int:
        return self.spans[-1][1]


def bind(recording: Recording, signal: str, steps: Sequence[Step], block_bytes: int) -> Chain:
    """Bind steps to one signal of a recording.

    Reads nothing, unless a step decides on the whole signal (``DropFlat``): then the steps
    before it run over the recording once.

    Parameters
    ----------
    recording
        Open for as long as the chain is used.
    signal
        Name of the signal.
    steps
        What to do, in order; none gives the signal as it is.
    block_bytes
        Size that no array on the way passes, halo included, if it can be. The blocks depend
        on it, on the steps and on the signal, and on nothing else. Where the halo is more
        than half of it, a block grows to twice its halo, so that no sample is computed more
        than about twice: see ``peak_bytes`` before a long filter is used in little memory.

    Returns
    -------
    Chain
        Its ``peak_bytes`` is ``predict_bytes`` of the same signal, steps and ``block_bytes``.

    Raises
    ------
    InputError
        If the recording has no such signal.
    SourceError
        If the signal cannot take a step.
    """
    source = signal_named(recording.signals, signal)
    peak_bytes = predict_bytes(source, steps, block_bytes)
    largest = _bound(source, steps)
    stages: list[Stage] = []

    def chain() -> Chain:
        result = stages[-1].signal if stages else source
        blocks = tuple(_blocks(source, largest[: len(stages)], block_bytes))
        return Chain(result, peak_bytes, recording, source, tuple(stages), blocks)

    for step in steps:
        incoming = stages[-1].signal if stages else source
        if isinstance(step, ScanningStep):
            stages.append(step.bind_scanned(incoming, _scan(chain())))
        else:
            stages.append(step.bind(incoming))
    return chain()


def predict_bytes(signal: Signal, steps: Sequence[Step], block_bytes: int) -> int:
    """Bound the memory that binding and walking through a chain takes, without reading.

    Raises
    ------
    SourceError
        If the signal cannot take a step.

    Examples
    --------
    >>> from engram.arrays import ArraySpec
    >>> signal = Signal("eeg", ArraySpec((1_000_000, 129), "float64", ("time", "channel")), 500.0)
    >>> predict_bytes(signal, [], 16 << 20) < 2.1 * (16 << 20)
    True
    """
    stages = _bound(signal, steps)
    scanned = [number for number, step in enumerate(steps) if isinstance(step, ScanningStep)]
    return max(_peak_bytes(signal, stages[:n], block_bytes) for n in [*scanned, len(stages)])


def _bound(source: Signal, steps: Sequence[Step]) -> tuple[Stage, ...]:
    """Bind steps without a pass over the samples: every channel is taken to stay.

    Blocks are laid out for these stages, so that they are known before the pass, and are
    the same whatever it finds.
    """
    if steps and (len(source.array.shape) != 2 or source.bank is not None):
        raise SourceError(
            f"Signal {source.name!r} of axes {', '.join(source.array.axes)}"
            f"{f', rows of bank {source.bank!r},' if source.bank else ''} cannot take {steps[0].name}. "
            "Apply steps to (time, channel) signals only."
        )
    stages: list[Stage] = []
    for step in steps:
        stages.append(step.bind(stages[-1].signal if stages else source))
    return tuple(stages)


def _blocks(source: Signal, stages: Sequence[Stage], block_bytes: int) -> Iterator[_Block]:
    """Lay a signal out in blocks, each as long as its largest array allows."""
    n_samples = stages[-1].signal.n_samples if stages else source.n_samples
    widths = [_width_bytes(source, stages), *(stage.signal.array.sample_bytes for stage in stages)]

    def size_bytes(start: int, stop: int) -> int:
        spans = _spans(stages, start, stop)
        return max((b - a) * width for (a, b), width in zip(spans, widths, strict=True))

    start = 0
    while start < n_samples:
        # One sample is nearly all halo: twice its size is halo and as many new samples.
        limit = max(block_bytes, 2 * size_bytes(start, start + 1) if stages else 0)
        later = range(start + 2, n_samples + 1)
        stop = start + 1 + bisect_right(later, limit, key=partial(size_bytes, start))
        yield _Block(_spans(stages, start, stop))
        start = stop


def _spans(stages: Sequence[Stage], start: int, stop: int) -> _Spans:
    spans = [(start, stop)]
    for stage in reversed(stages):
        spans.append(stage.needs(*spans[-1]))
    return tuple(reversed(spans))


def _width_bytes(source: Signal, stages: Sequence[Stage]) -> int:
    """Bytes of one source sample as the stages take it: float64, or as it is without any."""
    return source.array.sample_shape[0] * 8 if stages else source.array.sample_bytes


def _peak_bytes(source: Signal, stages: Sequence[Stage], block_bytes: int) -> int:
    """Bound what a walk holds: the block given last, and the dearest moment of the next."""
    blocks = tuple(_blocks(source, stages, block_bytes))
    given = max((_result_bytes(block, source, stages) for block in blocks), default=0)
    moment = max((_moment_bytes(block, source, stages) for block in blocks), default=0)
    return given + moment + SMALL_BYTES


def _result_bytes(block: _Block, source: Signal, stages: Sequence[Stage]) -> int:
    result = stages[-1].signal if stages else source
    return (block.stop - block.start) * result.array.sample_bytes


def _moment_bytes(block: _Block, source: Signal, stages: Sequence[Stage]) -> int:
    """Bound what is held while one block is read and run through the stages."""
    n_read = block.spans[0][1] - block.spans[0][0]
    width_bytes = _width_bytes(source, stages)
    moments = [n_read * source.array.sample_bytes]
    if stages and source.array.dtype != "float64":
        moments.append(n_read * (source.array.sample_bytes + width_bytes))
    for stage, (a, b), (start, stop) in zip(stages, block.spans, block.spans[1:], strict=False):
        moments.append((b - a) * width_bytes + stage.working_bytes(start, stop))
        width_bytes = stage.signal.array.sample_bytes
    return max(moments)


def _scan(chain: Chain) -> Scan:
    """Walk through a chain once for the smallest and largest sample of every channel."""
    width = chain.signal.array.sample_shape[0]
    minimum, maximum = np.full(width, np.nan), np.full(width, np.nan)
    for start, block in chain.blocks():
        rows = block.T  # along contiguous time: four times as fast
        for a, b in measured(chain.signal, start, start + len(block)):
            np.fmin(minimum, np.fmin.reduce(rows[:, a - start : b - start], axis=1), out=minimum)
            np.fmax(maximum, np.fmax.reduce(rows[:, a - start : b - start], axis=1), out=maximum)
    return Scan(minimum, maximum)
