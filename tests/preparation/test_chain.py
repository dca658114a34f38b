"""A chain gives the same samples in blocks as on the whole, within the memory it states."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import mne
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engram.arrays import ArraySpec
from engram.errors import InputError, SourceError
from engram.preparation.chain import Chain, bind, predict_bytes
from engram.preparation.steps import (
    BandPass,
    Clip,
    DropFlat,
    HighPass,
    LowPass,
    PickChannels,
    Rereference,
    Resample,
    Scale,
    Step,
)
from engram.recordings.recording import Channel, Events, Gap, Signal, read_blocks, signal_named

Make = Callable[[int, int], NDArray[Any]]


class Scripted:
    """A recording of one signal whose samples are made when they are read; counts the reads."""

    events = Events()
    whole = None

    def __init__(self, signal: Signal, make: Make) -> None:
        self.signals = (signal,)
        self._make = make
        self.reads: list[tuple[int, int]] = []

    def read(self, signal: str, start: int, stop: int) -> NDArray[Any]:
        """Make samples [start, stop)."""
        assert 0 <= start < stop <= signal_named(self.signals, signal).n_samples
        self.reads.append((start, stop))
        return self._make(start, stop)

    def blocks(self, signal: str, max_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Walk in the usual way."""
        return read_blocks(self, signal, max_bytes)

    def close(self) -> None:
        """Do nothing: there is no file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def recording_of(
    x: NDArray[Any], rate_hz: float = 100.0, gaps: tuple[Gap, ...] = (), *, named: bool = True
) -> Scripted:
    """Hold an array as a recording that gives copies, time contiguous as MNE's data come."""
    axes = ("time", "channel", "more")[: x.ndim]
    channels = tuple(Channel(f"E{i}") for i in range(x.shape[1])) if named else ()
    spec = ArraySpec(x.shape, x.dtype.name, axes)
    signal = Signal("eeg", spec, rate_hz, channels=channels, gaps=gaps)
    return Scripted(signal, lambda start, stop: x[start:stop].T.copy().T)


def noise(n_samples: int, n_channels: int = 3, seed: int = 0) -> NDArray[np.float64]:
    """Make a random walk about a large offset."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n_samples, n_channels)).cumsum(axis=0) + 100


def whole(chain: Chain) -> NDArray[Any]:
    """Put a chain's blocks together; they cover every sample once, in order."""
    blocks = list(chain.blocks())
    at = 0
    for start, block in blocks:
        assert start == at
        at += len(block)
    assert at == chain.signal.n_samples
    return np.concatenate([block for _, block in blocks])


CHANGES: dict[Step, Callable[[mne.io.BaseRaw], object]] = {
    HighPass(2): lambda raw: raw.filter(2, None, verbose="ERROR"),
    LowPass(20): lambda raw: raw.filter(None, 20, verbose="ERROR"),
    BandPass(3, 25): lambda raw: raw.filter(3, 25, verbose="ERROR"),
    Resample(80): lambda raw: raw.resample(80, method="polyphase", verbose="ERROR"),
    Resample(200): lambda raw: raw.resample(200, method="polyphase", verbose="ERROR"),
    Rereference(): lambda raw: raw.set_eeg_reference("average", verbose="ERROR"),
    PickChannels(names=["E2", "E0"]): lambda raw: raw.pick(["E2", "E0"]),
    Scale(0.5): lambda raw: raw.apply_function(lambda x: x * 0.5),
    Clip(50): lambda raw: raw.apply_function(lambda x: x.clip(-50, 50)),
}


@settings(max_examples=60)
@given(
    steps=st.lists(st.sampled_from(list(CHANGES)), min_size=1, max_size=4),
    n_periods=st.integers(1, 60),  # lengths that are whole at every rate
    block_bytes=st.sampled_from([1, 10_000, 50_000, 10**7]),
)
def test_chains_equal_mne(steps: list[Step], n_periods: int, block_bytes: int) -> None:
    """Steps one after the other give MNE's samples, whatever the blocks."""
    x = noise(25 * n_periods)
    recording = recording_of(x)
    raw = mne.io.RawArray(x.T.copy(), mne.create_info(["E0", "E1", "E2"], 100.0, "eeg"), verbose="ERROR")
    chain = bind(recording, "eeg", steps, block_bytes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="filter_length", category=RuntimeWarning)
        for step in steps:
            CHANGES[step](raw)
    expected = raw.get_data().T
    assert (chain.signal.array.shape, chain.signal.rate_hz) == (expected.shape, raw.info["sfreq"])
    assert np.abs(whole(chain) - expected).max() <= 1e-12 * np.abs(x).max()


@pytest.mark.parametrize("gaps", [(), (Gap(300, 400), Gap(1000, 1000))])
def test_blocks_do_not_show(gaps: tuple[Gap, ...]) -> None:
    """Two ways to lay out blocks give the same samples, and the same way the same bits."""
    x = noise(4000)
    steps = [HighPass(1), Resample(70), Rereference()]
    chains = [bind(recording_of(x, gaps=gaps), "eeg", steps, size) for size in (20_000, 20_000, 10**6)]
    first, again, other = map(whole, chains)
    assert np.array_equal(first, again)
    assert np.array_equal(first, whole(chains[0]))
    assert np.abs(first - other).max() <= 1e-12 * np.abs(x).max()


def test_drop_flat_sees_the_whole_signal_after_the_steps_before() -> None:
    """A channel is flat if it never changes outside of gaps, once the steps before it ran."""
    x = noise(2000, 4)
    x[:, 0] = 7.0
    x[:, 1] = 7.0
    x[500:510, 1] = 0.0  # in a gap
    x[1999, 2] += 1.0
    gaps = (Gap(500, 510),)
    chain = bind(recording_of(x, gaps=gaps), "eeg", [DropFlat()], 8_000)
    assert [channel.name for channel in chain.signal.channels] == ["E2", "E3"]
    assert np.array_equal(whole(chain), x[:, 2:])
    # The mean of E0 and E1 is what they are, so that the reference makes both flat at 0.
    referenced = bind(recording_of(x, gaps=gaps), "eeg", [Rereference(["E2"]), DropFlat()], 8_000)
    assert [channel.name for channel in referenced.signal.channels] == ["E0", "E1", "E3"]


def test_layout_does_not_depend_on_samples() -> None:
    """Blocks begin at the same samples whatever a pass over them finds."""
    flat = noise(3000, 8)
    flat[:, 1:6] = 0
    steps = [DropFlat(), HighPass(2), Resample(150)]
    starts = [
        [start for start, _ in bind(recording_of(x), "eeg", steps, 40_000).blocks()]
        for x in (noise(3000, 8), flat)
    ]
    assert starts[0] == starts[1]
    assert len(starts[0]) > 2


def test_no_steps_read_through() -> None:
    """Without steps the recording's blocks come as they are: dtype, shape, walk and all."""
    x = np.arange(10 * 4 * 2, dtype=np.uint8).reshape(10, 4, 2)
    recording = recording_of(x, named=False)
    chain = bind(recording, "eeg", [], 24)
    assert chain.signal == recording.signals[0]
    assert np.array_equal(whole(chain), x)
    assert whole(chain).dtype == np.uint8
    assert recording.reads[:4] == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_steps_without_halo_read_through() -> None:
    """Steps that look at one sample at a time read every sample once, integers as float64."""
    x = np.arange(300, dtype=np.int16).reshape(100, 3)
    recording = recording_of(x)
    found = whole(bind(recording, "eeg", [Scale(0.5), PickChannels(names=["E2"])], 240))
    assert np.array_equal(found, x[:, 2:] * 0.5)
    assert recording.reads == [(start, start + 10) for start in range(0, 100, 10)]


def test_one_sample_and_none() -> None:
    """A signal of one sample is one block, a signal of none is no block."""
    steps = [HighPass(1), Resample(50)]
    assert len(whole(bind(recording_of(noise(1)), "eeg", steps, 1000))) == 1
    assert list(bind(recording_of(np.zeros((0, 3))), "eeg", steps, 1000).blocks()) == []


def test_every_array_keeps_to_block_bytes() -> None:
    """Where the halo leaves room, no read passes block_bytes, and no smaller block would do."""
    recording = recording_of(noise(20_000))
    whole(bind(recording, "eeg", [HighPass(2)], 48_000))
    sizes = [(stop - start) * 24 for start, stop in recording.reads]
    assert max(sizes) == sizes[1] == 48_000


def test_blocks_grow_with_the_halo() -> None:
    """Where the halo is most of a block, blocks grow until they hold as many new samples."""
    recording = recording_of(noise(40_000))
    chain = bind(recording, "eeg", [HighPass(0.5)], 12_000)  # a halo of 2 x 330 samples of 24 bytes
    whole(chain)
    assert chain.peak_bytes > 2 * 661 * 24
    assert {stop - start for start, stop in recording.reads[1:-1]} == {2 * 661}
    assert sum(stop - start for start, stop in recording.reads) <= 2 * 40_000 + 661


@pytest.mark.parametrize(
    "signal",
    [
        Signal("eeg", ArraySpec((9, 4, 4), "uint8", ("frame", "height", "width")), 60.0),
        Signal("eeg", ArraySpec((9, 1), "int32", ("time", "image")), 60.0, bank="images"),
    ],
)
def test_steps_take_channels_only(signal: Signal) -> None:
    """Images and numbers of bank rows are refused by steps, and pass without."""
    recording = Scripted(signal, lambda start, stop: np.zeros((stop - start, *signal.array.sample_shape)))
    with pytest.raises(SourceError, match="cannot take scale"):
        bind(recording, "eeg", [Scale(2)], 1000)
    assert bind(recording, "eeg", [], 1000).signal == signal


def test_unknown_signal() -> None:
    """A signal that the recording does not have is named beside those it has."""
    with pytest.raises(InputError, match=r"'stim'.*eeg"):
        bind(recording_of(noise(5)), "stim", [], 1000)


LONG = [
    [],
    [HighPass(0.5)],
    [HighPass(0.5), Resample(100), Rereference(), Scale(0.1), Clip(50)],
    [PickChannels(exclude=["E3", "E70"]), BandPass(1, 100)],
    [Resample(300), DropFlat(1.0), LowPass(40)],
    [DropFlat()],
]


@pytest.mark.parametrize("steps", LONG, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "int16"])
def test_memory_stays_under_its_bound(steps: list[Step], dtype: str) -> None:
    """Binding and walking through a long recording takes at most peak_bytes, and most of them."""
    n_samples, n_channels, block_bytes = 60_000, 129, 8 << 20
    weights = np.arange(n_channels, dtype=dtype)[:, None]  # the first channel is flat

    def make(start: int, stop: int) -> NDArray[Any]:
        x = np.empty((n_channels, stop - start), dtype)  # the reader shall take nothing beside it
        x[...] = weights * (start % 97)
        return x.T

    channels = tuple(Channel(f"E{i}") for i in range(n_channels))
    spec = ArraySpec((n_samples, n_channels), dtype, ("time", "channel"))
    recording = Scripted(Signal("eeg", spec, 500.0, channels=channels), make)
    bind(recording, "eeg", steps, block_bytes)  # imports and caches are no part of the promise
    tracemalloc.start()
    try:
        chain = bind(recording, "eeg", steps, block_bytes)
        for _start, _block in chain.blocks():
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert chain.peak_bytes == predict_bytes(recording.signals[0], steps, block_bytes)
    assert 0.6 * chain.peak_bytes < peak_bytes <= chain.peak_bytes
