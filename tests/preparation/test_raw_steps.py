"""Callables on MNE's Raw are steps with a name, a version, and a bound on memory."""

from __future__ import annotations

import functools
import pickle
import warnings
from types import SimpleNamespace
from typing import Any

import mne
import numpy as np
import pytest
import scipy.signal
from numpy.typing import NDArray

from engram.errors import DoesNotFit, InputError, SourceError
from engram.preparation.raw_steps import RawStep, apply_raw_steps, split_steps, whole_bytes
from engram.preparation.steps import HighPass, Resample
from engram.recordings.mne_raw import RawRecording
from engram.recordings.recording import Events


def raw_of(n_samples: int = 1000, rate_hz: float = 100.0) -> mne.io.RawArray:
    """Make a recording of two channels, in volts."""
    x = np.random.default_rng(0).standard_normal((2, n_samples)) * 1e-5
    return mne.io.RawArray(x, mne.create_info(["E1", "E2"], rate_hz, "eeg"), verbose="ERROR")


def halve(raw: mne.io.BaseRaw) -> None:
    """Halve in place, and give nothing."""
    raw.apply_function(lambda x: x / 2, verbose="ERROR")


def crop(raw: mne.io.BaseRaw) -> mne.io.BaseRaw:
    """Keep seconds 2 to 6."""
    return raw.crop(2.0, 6.0, include_tmax=False)


def annotate(raw: mne.io.BaseRaw) -> None:
    """Mark half a second as bad."""
    raw.annotations.append(3.0, 0.5, "BAD_muscle")


@pytest.fixture
def braindecode() -> Any:
    """braindecode's preprocessing; importing it brings torch, so only where it is needed."""
    return pytest.importorskip("braindecode.preprocessing")


HALVE = RawStep(halve, "halve", "1")
PLENTY = 1 << 30


def test_a_raw_step_is_a_value() -> None:
    """Name, version and details are what is kept of it; it is comparable, hashable, picklable."""
    step = RawStep(halve, "halve", "1", {"by": 2, "where": ["E1"]})
    assert (step.name, step.settings()) == ("halve", {"version": "1", "by": 2, "where": ["E1"]})
    assert pickle.loads(pickle.dumps(step)) == step
    assert len({step, RawStep(halve, "halve", "1", {"by": 2, "where": ["E1"]})}) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"function": "filter"},
        {"name": ""},
        {"version": ""},
        {"version": 1},
        {"details": {"window": np.zeros(3)}},
        {"details": {"limit": float("nan")}},
    ],
    ids=str,
)
def test_bad_raw_steps_are_refused(fields: dict[str, Any]) -> None:
    """What cannot be called, named or written as JSON is an InputError when the step is built."""
    with pytest.raises(InputError):
        RawStep(**{"function": halve, "name": "halve", "version": "1", **fields})


def test_split_steps(braindecode: Any) -> None:
    """Steps on the Raw come first, steps on blocks after them, each in their order."""
    raw_steps, block_steps = split_steps(
        [HALVE, braindecode.Filter(l_freq=1.0, h_freq=None), HighPass(1), Resample(50)]
    )
    assert [step.name for step in raw_steps] == ["halve", "mne.filter"]
    assert block_steps == (HighPass(1), Resample(50))
    with pytest.raises(InputError, match="Put halve before"):
        split_steps([HighPass(1), HALVE])


@pytest.mark.parametrize(
    ("step", "remedy"), [(halve, r"RawStep\(halve, name"), ("filter", "HighPass"), (None, "None")]
)
def test_what_is_no_step_is_refused(step: object, remedy: str) -> None:
    """A callable without version, or anything else, is refused with what to use instead."""
    with pytest.raises(InputError, match=remedy):
        split_steps([step])


def settings_of(preprocessor: object) -> tuple[str, dict[str, Any]]:
    """Say what is kept of a preprocessor."""
    (step,), _ = split_steps([preprocessor])
    return step.name, step.settings()


def test_preprocessors_are_known_by_what_they_call(braindecode: Any) -> None:
    """A method of Raw goes by MNE's version, a package's function by the package's, with arguments."""
    version = ".".join(mne.__version__.split(".")[:2])
    name, kept = settings_of(braindecode.Filter(l_freq=np.float64(1.0), h_freq=None))
    assert (name, kept) == ("mne.filter", {"version": version, "kwargs": {"l_freq": 1.0, "h_freq": None}})

    name, kept = settings_of(braindecode.Preprocessor(scipy.signal.detrend, type="constant"))
    assert name == "scipy.signal._signaltools.detrend"
    assert kept == {"version": scipy.__version__, "kwargs": {"type": "constant"}, "apply_on_array": True}

    partial = functools.partial(scipy.signal.detrend, type="linear")
    assert settings_of(braindecode.Preprocessor(partial, type="constant"))[1]["kwargs"] == {
        "type": "constant"
    }
    assert settings_of(braindecode.Preprocessor(np.multiply, factor=2))[0] == "numpy.multiply"


class _Gain:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        return x * self.factor


@pytest.mark.parametrize(
    "function",
    [lambda x: x / 2, _Gain(2).__call__, _Gain(2), halve],
    ids=["lambda", "method", "object", "module"],
)
def test_preprocessors_of_unknown_code_are_refused(braindecode: Any, function: Any) -> None:
    """Code of no installed package, or with state, is refused with the RawStep to use instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Preprocessing choices with lambda")
        preprocessor = braindecode.Preprocessor(function)
    with pytest.raises(InputError, match=r"RawStep\(preprocessor.apply"):
        split_steps([preprocessor])


def test_preprocessors_run_as_in_braindecode(braindecode: Any) -> None:
    """A Preprocessor does what braindecode does with it."""
    raw = raw_of()
    preprocessors = [
        braindecode.Preprocessor("filter", l_freq=2.0, h_freq=None, verbose="ERROR", apply_on_array=False),
        braindecode.Preprocessor(scipy.signal.detrend),
    ]
    raw_steps, _ = split_steps(preprocessors)
    result = apply_raw_steps(RawRecording(raw), raw_steps, PLENTY)
    expected = raw.copy()
    for preprocessor in preprocessors:
        preprocessor.apply(expected)
    assert np.array_equal(result.read("eeg", 0, 1000), expected.get_data(units="uV").T)


def test_steps_run_in_order_on_a_copy() -> None:
    """Steps follow each other; the recording handed in stays as it is."""
    raw = raw_of()
    before = raw.get_data()
    result = apply_raw_steps(RawRecording(raw), [HALVE, RawStep(crop, "crop", "1"), HALVE], PLENTY)
    assert np.array_equal(raw.get_data(), before)
    assert np.array_equal(result.read("eeg", 0, 400), before.T[200:600] * 1e6 / 4)


def test_what_does_not_fit_is_refused_before_loading() -> None:
    """The prediction is compared with the memory there is before a sample is read."""
    recording = RawRecording(raw_of())
    assert whole_bytes(recording) == 2 * 1000 * 8 * 3

    def never(raw: mne.io.BaseRaw) -> None:
        raise AssertionError

    with pytest.raises(DoesNotFit, match="never needs the whole recording") as caught:
        apply_raw_steps(recording, [RawStep(never, "never", "1")], 47_999)
    assert (caught.value.needed_bytes, caught.value.allowed_bytes) == (48_000, 47_999)


def test_failing_steps_name_themselves() -> None:
    """A step that raises refuses the recording; one that gives something else is to be mended."""
    recording = RawRecording(raw_of())

    def fails(raw: mne.io.BaseRaw) -> None:
        raise RuntimeError("no montage")

    with pytest.raises(SourceError, match=r"fails failed .*no montage"):
        apply_raw_steps(recording, [RawStep(fails, "fails", "1")], PLENTY)
    with pytest.raises(InputError, match="data gave a ndarray"):
        apply_raw_steps(recording, [RawStep(lambda raw: raw.get_data(), "data", "1")], PLENTY)
    with pytest.raises(InputError, match="MNE does not read"):
        apply_raw_steps(SimpleNamespace(whole=None), [HALVE], PLENTY)


# -- events ------------------------------------------------------------------------------

OWN = Events((1.0, 3.0, 5.0, 7.0), (0.0,) * 4, ("a", "b", "c", "d"), {"value": ("1", "2", None, "4")})


def after(*functions: Any, raw: mne.io.BaseRaw | None = None, events: Events | None = OWN) -> Events:
    """Give the events after some steps."""
    steps = [RawStep(function, function.__name__, "1") for function in functions]
    return apply_raw_steps(RawRecording(raw or raw_of(), events), steps, PLENTY).events


def test_events_of_their_own_are_kept() -> None:
    """Steps that leave time and annotations alone leave the events alone, resampling included."""

    def resample(raw: mne.io.BaseRaw) -> None:
        raw.resample(50.0, verbose="ERROR")

    raw = raw_of()
    raw.annotations.append(4.0, 0.1, "in the file")
    assert after(halve, resample, raw=raw) == OWN
    # The first sample's number, 101, is rounded to the new rate: 50 is not the same time.
    late = raw.copy().crop(1.01)
    assert after(resample, raw=late) == OWN


def test_events_of_their_own_move_with_a_crop() -> None:
    """Cropping moves the events of events.tsv to the new clock and drops those outside."""
    moved = after(crop)
    assert moved == Events((1.0, 3.0), (0.0, 0.0), ("b", "c"), {"value": ("2", None)})


def test_annotations_that_a_step_adds_are_added() -> None:
    """What a step annotates comes to the events of events.tsv, in order and without extras."""
    found = after(annotate, crop)
    assert found.onset_s == (1.0, 1.0, 3.0)
    assert found.description == ("b", "BAD_muscle", "c")
    assert found.extras == {"value": ("2", None, None)}


def test_events_that_are_annotations_follow_them() -> None:
    """Where the events are the annotations, they are what the steps make of those."""
    raw = raw_of()
    raw.annotations.append([1.0, 4.0], 0.0, ["a", "b"])
    found = after(annotate, crop, raw=raw, events=None)
    assert found.description == ("BAD_muscle", "b")
    assert found.onset_s == (1.0, 2.0)
