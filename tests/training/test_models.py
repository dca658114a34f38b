import itertools
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier, RidgeCV
from sklearn.preprocessing import StandardScaler

from engram.batches.windows import SplitWindows, Windows
from engram.errors import DoesNotFit, InputError, MissingExtra
from engram.memory import Usage
from engram.preparation.ingest import prepare
from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
from engram.recordings.recording import Channel
from engram.store.reader import Store
from engram.testing.trials import make_trials
from engram.training import models
from engram.training.metrics import score_predictions
from engram.training.models import RidgeSettings, build_model, fit_ridge, model_names
from engram.training.networks import ChannelScaling, ShiftedMean
from engram.training.settings import Framing
from engram.units import format_bytes
from engram.windows.spec import EventWindows, FixedWindows, Span
from engram.windows.splits import Side, Split
from engram.windows.targets import RecordingColumn, SignalTarget, TimeTo

RATE_HZ = 100.0
Maker = Callable[[ArraySource], Store]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Maker]:
    """Prepare sources in float32, and close the stores after the test."""
    stores: list[Store] = []

    def prepared(source: ArraySource) -> Store:
        stores.append(prepare(source, tmp_path / f"store{len(stores)}", precision="float32").store)
        return stores[-1]

    yield prepared
    for store in stores:
        store.close()


def noise(n_chans: int, n_samples: int, *, seed: int = 0, positions: bool = False) -> ArraySignal:
    """Draw white EEG; with positions on a circle where they are asked for."""
    names = [f"E{i + 1}" for i in range(n_chans)]
    places = [(0.1 * np.cos(i), 0.1 * np.sin(i), 0.02) for i in range(n_chans)]
    channels = tuple(
        Channel(name, position_m=place if positions else None)
        for name, place in zip(names, places, strict=True)
    )
    x = np.random.default_rng(seed).normal(0, 10, (n_samples, n_chans)).astype(np.float32)
    return ArraySignal(x, RATE_HZ, channels=channels)


def two_windows(make: Maker, n_chans: int, n_times: int, *, positions: bool = False) -> Windows:
    """Store two windows with a number each to predict."""
    eeg = noise(n_chans, 2 * n_times, positions=positions)
    store = make(ArraySource({"a": ArrayRecording({"eeg": eeg})}))
    return store.windows(FixedWindows(signal="eeg", window_size_samples=n_times)).with_targets([0.5, 1.5])


# ---------------------------------------------------------------- networks


NETWORKS = ["EEGNeX", "EEGConformer", "ShallowFBCSPNet", "Deep4Net", "ATCNet"]


# What braindecode and torch remark on 129 channels, two seconds at 100 Hz, and three samples.
remarks = pytest.mark.filterwarnings(
    "ignore:This model has only been tested on no more than 64 channels:UserWarning",
    r"ignore:n_times \(\d+\) is smaller than the minimum required:UserWarning",
    "ignore:Using padding='same' with even kernel lengths and odd dilation:UserWarning",
    "ignore:Initializing zero-element tensors is a no-op:UserWarning",
)


@remarks
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_of_braindecode_learns_from_its_windows(make: Maker, name: str) -> None:
    """Gradients reach every weight of a network that was built for the windows."""
    windows = two_windows(make, 129, 200)
    try:
        model = build_model(name, windows, {})
    except InputError as error:
        pytest.skip(str(error))
    batch = windows.read([0, 1])
    out = model(batch.X)
    assert batch.y is not None
    assert out.shape == batch.y.shape == (2, 1)
    torch.nn.functional.mse_loss(out, batch.y).backward()  # type: ignore[no-untyped-call]
    assert model.training
    assert all(weights.grad is not None for weights in model.parameters() if weights.requires_grad)


@remarks
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "ATCNet"])  # which takes any length
def test_windows_too_short_for_a_network_are_refused_by_their_size(make: Maker, name: str) -> None:
    """Three samples are too short for any pooling: the error names network, windows and remedy."""
    size = f"{name} does not take windows of 5 channels and 3 samples at 100 Hz: .* Use longer windows"
    with pytest.raises(InputError, match=size) as caught:
        build_model(name, two_windows(make, 5, 3), {})
    assert caught.value.__cause__ is not None


OWN = ["BandPowerNet", "MultiScaleNet", "PatchAttentionNet", "TimeLocalizer"]


@pytest.mark.parametrize("name", OWN)
def test_engrams_own_networks_are_built_by_name_too(make: Maker, name: str) -> None:
    """With arguments by keyword, and refused in the same words."""
    windows = two_windows(make, 5, 100)
    model = build_model(name, windows, {"drop_prob": 0.125})
    assert model(windows.read([0, 1]).X).shape == (2, 1)
    assert any(isinstance(part, torch.nn.Dropout) and part.p == 0.125 for part in model.modules())
    assert name in model_names()
    with pytest.raises(InputError, match=f"{name} has no argument 'drop_prop'. Did you mean 'drop_prob'"):
        build_model(name, windows, {"drop_prop": 0.1})


def test_layers_before_and_behind_are_a_part_of_the_network(make: Maker) -> None:
    """Scales and the mean target are of the training windows, and are loaded with the weights."""
    windows = two_windows(make, 5, 200)
    framing = Framing(scaling="channel", downsample=2, reach=0.25, test_shifts=(-1, 0, 1))
    model = build_model("MultiScaleNet", windows, {"n_blocks": 6}, framing=framing)
    x = windows.read([0, 1]).signals["eeg"]
    scaling = next(part for part in model.modules() if isinstance(part, ChannelScaling))
    low, middle, high = np.percentile(x.numpy(), (25, 50, 75), axis=(0, 2))
    np.testing.assert_allclose(scaling.center[:, 0], middle, rtol=1e-6)
    np.testing.assert_allclose(scaling.scale[:, 0], high - low, rtol=1e-6)
    out = model.eval()(x)
    assert (out - 1.0).abs().max() <= 0.25
    again = build_model("MultiScaleNet", windows, {"n_blocks": 6}, framing=framing, has_constants=False)
    assert not torch.equal(again.eval()(x), out)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), out)
    with pytest.raises(InputError, match=r"5 channels and 200 samples at 100 Hz.*halved 7 times"):
        build_model("MultiScaleNet", windows, {"n_blocks": 7}, framing=framing)
    with pytest.raises(InputError, match=r"reach=0\.25 is for regression"):
        build_model("MultiScaleNet", windows.with_targets([0, 1], ["a", "b"]), {}, framing=framing)


def test_a_shift_of_a_window_is_taken_from_a_time(make: Maker) -> None:
    """Where the target is the time to an event; any other does not move with the window."""
    store = make(make_trials(2, 5))
    spec = EventWindows(signal="eeg", anchor=("square",), trial_duration_s=1.0)
    for target, moved_s in ((TimeTo(("rt",)), 0.01), (RecordingColumn("age"), 0.0)):
        model = build_model(
            "TimeLocalizer", store.windows(spec, target), {}, framing=Framing(test_shifts=(0, 5))
        )
        assert isinstance(model, ShiftedMean)
        assert float(model.seconds_per_sample) == pytest.approx(moved_s)


def test_a_class_is_an_output(make: Maker) -> None:
    """For classification a network has one output per class."""
    windows = two_windows(make, 4, 200).with_targets([2, 0], classes=["a", "b", "c"])
    assert build_model("SCCNet", windows, {})(windows.read([0]).X).shape == (1, 3)


def test_the_seed_alone_decides_the_weights(make: Maker) -> None:
    """Equal seeds give equal weights whatever was drawn before, and draw nothing from the caller."""
    windows = two_windows(make, 4, 200)
    torch.manual_seed(3)
    one = build_model("SCCNet", windows, {}, seed=1).state_dict()
    drawn = torch.rand(1)
    same = build_model("SCCNet", windows, {}, seed=1).state_dict()
    other = build_model("SCCNet", windows, {}, seed=2).state_dict()
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_arguments_reach_the_network(make: Maker) -> None:
    """Numbers go in as they are, the name of a layer as the layer, a list as a tuple."""
    windows = two_windows(make, 4, 200)
    model = build_model("SCCNet", windows, {"drop_prob": 0.125, "activation": "ELU"})
    assert any(isinstance(part, torch.nn.Dropout) and part.p == 0.125 for part in model.modules())
    assert any(isinstance(part, torch.nn.ELU) for part in model.modules())
    build_model("EEGInceptionERP", windows, {"scales_samples_s": [0.4, 0.2, 0.1]})


def test_positions_of_channels_reach_networks_that_read_them(make: Maker) -> None:
    """Names and positions are handed on; without positions such a network is refused, not fed with NaN."""
    with_places = two_windows(make, 8, 200, positions=True)
    model = build_model("SignalJEPA_Contextual", with_places, {})
    found: Any = model.chs_info
    assert [each["ch_name"] for each in found] == list(with_places.ch_names)
    expected = [0.1 * np.cos(3), 0.1 * np.sin(3), 0.02]
    np.testing.assert_allclose(found[3]["loc"][:3], expected, rtol=1e-6)
    with pytest.raises(InputError, match="SignalJEPA_Contextual does not take"):
        build_model("SignalJEPA_Contextual", two_windows(make, 8, 200), {})


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("eegnex", {}, "no model 'eegnex'. Did you mean 'EEGNeX'"),
        ("EEGModuleMixin", {}, "no model 'EEGModuleMixin'"),
        ("my_module.Net", {}, "Use one of: ATCNet"),
        ("EEGNeX", {"dropprob": 0.1}, "EEGNeX has no argument 'dropprob'. Did you mean 'drop_prob'"),
        ("EEGNet", {"momentum": 0.1}, "EEGNet has no argument 'momentum'"),
        ("EEGNeX", {"n_chans": 3}, "'n_chans' of EEGNeX is taken from the windows"),
        ("EEGNeX", {"activation": "ReLUU"}, "there is none named 'ReLUU'. Use 'ReLU'"),
        ("EEGNeX", {"activation": "os.system"}, "there is none named 'os.system'"),
        ("EEGNeX", {"drop_prob": "half"}, "EEGNeX does not take windows of 4 channels"),
        ("SignalJEPA", {}, r"gives \(2, .*\) for two windows of 4 channels .*, where \(2, 1\) is needed"),
    ],
)
def test_a_wrong_model_is_refused_with_a_remedy(
    make: Maker, name: str, arguments: dict[str, object], words: str
) -> None:
    """A name, an argument or a layer that braindecode does not have is answered with the nearest one."""
    with pytest.raises(InputError, match=words):
        build_model(name, two_windows(make, 4, 200, positions=True), arguments)


def test_a_network_reads_one_signal(make: Maker) -> None:
    """Windows of several signals are not braindecode's to read."""
    recording = ArrayRecording({"eeg": noise(4, 400), "emg": noise(2, 400)})
    spec = FixedWindows(signal="eeg", window_size_samples=200, beside=(Span(signal="emg"),))
    windows = make(ArraySource({"a": recording})).windows(spec).with_targets([0.5, 1.5])
    with pytest.raises(InputError, match="EEGNeX reads one signal, these windows have eeg, emg"):
        build_model("EEGNeX", windows, {})


def test_a_signal_is_no_target_of_a_network_of_braindecode(make: Maker) -> None:
    """It is refused before the first epoch, with what to do."""
    signals = {"eeg": noise(4, 400), "emg": noise(4, 400)}
    store = make(ArraySource({"a": ArrayRecording(signals)}))
    spec = FixedWindows(signal="eeg", window_size_s=2.0, beside=(Span(signal="emg"),))
    with pytest.raises(InputError, match=r"the target is the signal 'emg'.*engram\.fit"):
        build_model("SCCNet", store.windows(spec, SignalTarget("emg")), {})


def test_names_are_braindecodes() -> None:
    """Every name is a network class of ``braindecode.models``, sorted; its base class is none."""
    names = model_names()
    assert {"ATCNet", "Deep4Net", "EEGConformer", "EEGNeX", "EEGNet", "ShallowFBCSPNet"} <= set(names)
    assert "EEGModuleMixin" not in names
    assert list(names) == sorted(names)


# ---------------------------------------------------------------- the ridge


N_SUBJECTS, N_WINDOWS, N_CHANS, N_TIMES = 6, 30, 4, 50


def planted(
    make: Maker, signals: Sequence[str] = ("eeg",), n_classes: int = 0
) -> tuple[SplitWindows, np.ndarray]:
    """Store subjects whose windows' mean in the first channel is the target (its rank, for classes)."""
    draw = np.random.default_rng(0)
    n_all = N_SUBJECTS * N_WINDOWS
    target = draw.normal(1, 0.5, n_all)
    x = draw.normal(0, 1, (n_all, N_TIMES, N_CHANS))
    x[:, :, 0] += 3 * target[:, None]
    x = x.astype(np.float32)
    recordings = {
        f"s{i}": ArrayRecording(
            {name: ArraySignal(part.reshape(-1, N_CHANS), RATE_HZ) for name in signals},
            fields={"subject": f"s{i}"},
        )
        for i, part in enumerate(np.split(x, N_SUBJECTS))
    }
    spec = FixedWindows(
        signal=signals[0],
        window_size_samples=N_TIMES,
        beside=tuple(Span(signal=name) for name in signals[1:]),
    )
    windows = make(ArraySource(recordings)).windows(spec)
    if n_classes:
        ranks = np.argsort(np.argsort(target)) ** 2 * n_classes // n_all**2  # of unequal sizes
        windows = windows.with_targets(ranks, classes=[str(i) for i in range(n_classes)])
    else:
        windows = windows.with_targets(target)
    split = Split(test=Side(values=("s4",)), valid=Side(values=("s5",)))
    return windows.split(split), x


def bins_of(x: np.ndarray, n_bins: int) -> np.ndarray:
    """Average (window, time, channel) in equal stretches: (window, feature)."""
    return np.asarray(x.reshape(len(x), n_bins, -1, N_CHANS).mean(axis=2, dtype=np.float64)).reshape(
        len(x), -1
    )


def test_the_ridge_is_scikit_learns_on_coarse_averages(make: Maker) -> None:
    """Predictions equal those of StandardScaler and RidgeCV on the averaged windows."""
    sides, x = planted(make)
    fitted = fit_ridge(sides, RidgeSettings(n_bins=5))
    features = bins_of(x, 5)
    train, test, valid = features[:120], features[120:150], features[150:]
    scaler = StandardScaler().fit(train)
    y = np.concatenate([sides.train.read([i]).y.numpy() for i in range(120)])  # type: ignore[union-attr]
    ridge = RidgeCV(models._ALPHAS).fit(scaler.transform(train), y[:, 0])
    assert fitted.alpha == ridge.alpha_
    for side, part in (("test", test), ("valid", valid)):
        expected = ridge.predict(scaler.transform(part))[:, None]
        np.testing.assert_allclose(fitted.predictions[side], expected, rtol=1e-4, atol=1e-5)
    assert (fitted.n_windows, fitted.n_features) == (120, 20)
    assert fitted.note == (
        "The ridge saw 20 features (averages in 5 stretches) of 120 training windows; "
        f"alpha {ridge.alpha_:g} by leave-one-out."
    )


def test_the_ridge_reads_unseen_subjects(make: Maker) -> None:
    """A linear effect is found again in subjects that were not trained on."""
    sides, _ = planted(make)
    assert sides.test is not None
    target, train_target = (side.read(np.arange(len(side))).y for side in (sides.test, sides.train))
    assert target is not None
    assert train_target is not None
    prediction = fit_ridge(sides).predictions["test"]
    (score,) = score_predictions("ridge", "test", ["nrmse"], target.numpy(), prediction, train_target.numpy())
    assert score.value < 0.3


@pytest.mark.parametrize("n_classes", [2, 3])
def test_classes_are_chosen_as_scikit_learn_does(make: Maker, n_classes: int) -> None:
    """The likeliest class is that of RidgeClassifier with balanced weights; figures sum to 1."""
    sides, x = planted(make, n_classes=n_classes)
    fitted = fit_ridge(sides, RidgeSettings(n_bins=5))
    features = bins_of(x, 5)
    scaler = StandardScaler().fit(features[:120])
    y = sides.train.read(np.arange(120)).y
    assert y is not None
    # Targets of -1 and 1 instead of 0 and 1: the same classifier with the same penalty.
    other = RidgeClassifier(alpha=fitted.alpha, class_weight="balanced")
    other.fit(scaler.transform(features[:120]), y.numpy())
    shares = fitted.predictions["test"]
    assert shares.shape == (30, n_classes)
    assert shares.min() >= 0
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-5)
    expected = other.predict(scaler.transform(features[120:150]))
    assert np.array_equal(shares.argmax(axis=1), expected)


def test_memory_of_the_ridge_is_bounded_and_said(make: Maker) -> None:
    """What NumPy allocates while fitting stays within ``memory`` and batches; what is left out is told."""
    sides, _ = planted(make)
    memory = 64 * 8 * models._VALUES_PER_WINDOW * (40 + 1)
    settings = RidgeSettings(memory=memory)
    fit_ridge(sides, settings)  # imports and caches
    tracemalloc.start()
    fitted = fit_ridge(sides, settings)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert fitted.n_windows == 64
    assert f"64 training windows of 120, drawn to fit {format_bytes(memory)}" in fitted.note
    window_bytes = N_TIMES * N_CHANS * 4
    assert peak_bytes <= memory + 120 * 8 * window_bytes
    again, other = fit_ridge(sides, settings), fit_ridge(sides, RidgeSettings(memory=memory, seed=1))
    assert np.array_equal(again.predictions["test"], fitted.predictions["test"])
    assert not np.array_equal(other.predictions["test"], fitted.predictions["test"])


def test_where_less_is_left_the_ridge_takes_a_half_of_its_memory_or_a_quarter(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what the process holds already; where nothing is left, it does not fit."""
    sides, _ = planted(make)
    held_bytes, of_64_windows = 10_000_000, 64 * 8 * models._VALUES_PER_WINDOW * (40 + 1)
    monkeypatch.setattr(models, "read_usage", lambda: Usage(held_bytes, 1, "RSS"))
    settings = RidgeSettings(memory=4 * of_64_windows)
    fitted = fit_ridge(sides, settings, memory=held_bytes + 2 * of_64_windows - 1)
    assert fitted.n_windows == 64
    with pytest.raises(DoesNotFit):
        fit_ridge(sides, settings, memory=held_bytes)


def test_too_little_memory_for_a_ridge_does_not_fit(make: Maker) -> None:
    """Memory for a handful of windows is refused with both figures."""
    with pytest.raises(DoesNotFit, match="Give more memory") as caught:
        fit_ridge(planted(make)[0], RidgeSettings(memory=100_000))
    assert caught.value.allowed_bytes == 100_000
    assert caught.value.needed_bytes > 100_000


def test_several_signals_are_features_side_by_side(make: Maker) -> None:
    """Every input signal brings its channels times stretches."""
    sides, _ = planted(make, signals=("eeg", "emg"))
    assert fit_ridge(sides, RidgeSettings(n_bins=5)).n_features == 2 * N_CHANS * 5


def test_sentences_of_any_length_have_as_many_features(make: Maker) -> None:
    """Windows of differing lengths are averaged over their own samples, not over the zeros behind."""
    lengths = [*range(5, 65), 3]
    recordings = {
        f"s{i:02}": ArrayRecording({"eeg": ArraySignal(np.full((n, 2), i, np.float32), RATE_HZ)})
        for i, n in enumerate(lengths)
    }
    windows = make(ArraySource(recordings)).windows(FixedWindows(signal="eeg"))
    sides = windows.with_targets(np.arange(float(len(lengths)))).split(
        Split(test=Side(by="recording", values=("s60",)))
    )
    fitted = fit_ridge(sides)
    assert fitted.n_features == 20
    assert fitted.predictions["test"].item() == pytest.approx(60, rel=1e-2)


def test_a_short_first_window_makes_no_large_chunks(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many windows are read at a time is by the longest there is."""
    monkeypatch.setattr(models, "_CHUNK_BYTES", 1 << 16)
    recordings = {
        f"s{i:02}": ArrayRecording({"eeg": ArraySignal(np.ones((n, 2), np.float32), RATE_HZ)})
        for i, n in enumerate([5, *[1000] * 60])
    }
    windows = make(ArraySource(recordings)).windows(FixedWindows(signal="eeg"))
    chunks = list(models._chunks(windows, np.arange(len(windows))))
    assert max(batch.n_bytes for _, batch in chunks) <= 1 << 16
    assert sum(len(batch) for _, batch in chunks) == 61


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_stretches_are_averaged_as_a_loop_would(n_samples: int, n_bins: int, n_chans: int) -> None:
    """Stretch k of n holds samples [k * time // n, (k + 1) * time // n), at least the first of them."""
    samples = np.random.default_rng(0).integers(-9, 9, (n_samples, n_chans))
    starts = [k * n_samples // n_bins for k in range(n_bins + 1)]
    expected = [samples[a : max(b, a + 1)].mean(axis=0) for a, b in itertools.pairwise(starts)]
    np.testing.assert_allclose(models._averaged(samples, n_bins), np.ravel(expected))


def test_a_ridge_needs_targets_and_finite_values(make: Maker) -> None:
    """Windows without a target, or with a value that is not finite, are named in an InputError."""
    x = np.ones((400, 2), np.float32)
    x[350, 1] = np.nan
    recordings = {
        f"s{i}": ArrayRecording({"eeg": ArraySignal(x, RATE_HZ)}, fields={"subject": f"s{i}"})
        for i in range(2)
    }
    windows = make(ArraySource(recordings)).windows(FixedWindows(signal="eeg", window_size_samples=4))
    split = Split(test=Side(values=("s1",)))
    with pytest.raises(InputError, match="no target"):
        fit_ridge(windows.split(split))
    with pytest.raises(InputError, match="not finite"):
        fit_ridge(windows.with_targets(np.arange(float(len(windows)))).split(split))


@pytest.mark.parametrize(("values", "words"), [({"n_bins": 0}, "n_bins=0"), ({"memory": "much"}, "'much'")])
def test_settings_of_the_ridge_are_checked(values: dict[str, int], words: str) -> None:
    """A setting out of range is refused with its value."""
    with pytest.raises(InputError, match=words):
        RidgeSettings(**values)


@pytest.mark.parametrize("library", ["braindecode", "sklearn.linear_model"])
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, library: str, make: Maker
) -> None:
    """Without braindecode or scikit-learn the error says what to install."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra):
        model_names() if library == "braindecode" else fit_ridge(planted(make)[0])
