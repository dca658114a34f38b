"""What is trained: networks of braindecode by their names, and a ridge to compare them with.

This module decides how a name and a few arguments become a network that fits the windows, and what
the linear baseline sees. How a network is trained is ``engram.training.fit``'s, how predictions are
scored ``engram.training.metrics``'s.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engram.batches.batch import Batch
from engram.batches.windows import SplitWindows, Windows
from engram.errors import DoesNotFit, InputError, MissingExtra
from engram.memory import Budget, read_usage
from engram.training.networks import (
    BandPowerNet,
    Bounded,
    ChannelScaling,
    Downsample,
    MultiScaleNet,
    PatchAttentionNet,
    ShiftedMean,
    TimeLocalizer,
    WindowScaling,
)
from engram.training.settings import Framing
from engram.units import format_bytes, parse_bytes
from engram.windows.targets import TimeTo

__all__ = ["RidgeFit", "RidgeSettings", "build_model", "fit_ridge", "model_names"]

# ---------------------------------------------------------------- networks

_FILLED_IN = ("n_chans", "n_times", "sfreq", "n_outputs", "chs_info", "input_window_seconds")
"""Arguments of braindecode's networks that say what the windows are."""


def model_names() -> tuple[str, ...]:
    """Name the networks that ``build_model`` knows: braindecode's classes and Engram's own, sorted.

    Raises
    ------
    MissingExtra
        If braindecode is not installed.

    Examples
    --------
    >>> "EEGNeX" in model_names()
    True
    """
    return tuple(sorted({**_OWN, **_model_classes()}))


def build_model(
    name: str,
    windows: Windows,
    arguments: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    framing: Framing | None = None,
    has_constants: bool = True,
) -> nn.Module:
    """Build a network that fits windows.

    Parameters
    ----------
    name
        Name of a class in ``braindecode.models``, such as ``"EEGNeX"``, or in
        ``engram.training.networks``, such as ``"TimeLocalizer"``.
    windows
        What it will read: channels, samples, rate, outputs and channel positions are theirs.
    arguments
        Further arguments of the class, such as ``{"drop_prob": 0.3}``. Where the class takes a
        layer, such as ``activation``, its name in ``torch.nn`` or ``braindecode.modules``:
        ``{"activation": "ELU"}``.
    seed
        Decides the first weights, whatever was drawn before.
    framing
        What stands before and behind the network; None: nothing.
    has_constants
        Whether ``windows`` are the training windows, of which constants of the framing are taken (scales
        of channels, the mean target, whether it is a time). False: weights will be loaded that have them.

    Returns
    -------
    Module
        From (window, channel, time) float32 to (window, output), on the CPU. Two windows of zeros
        have gone through it, so what it cannot read fails here and not in the first step.

    Raises
    ------
    InputError
        If there is no such network or argument, or the network does not take such windows, the most
        usual reason being that they are too short for its pooling.
    MissingExtra
        If braindecode is not installed.

    Notes
    -----
    Nothing that a recipe names is executed: a name is looked up among braindecode's classes. ``REVE``
    and ``STEEGFormer`` download a table of electrodes when they are built; no other network does.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> import engram
    >>> from engram.windows import FixedWindows
    >>> eeg = engram.ArraySignal(np.zeros((1000, 4), "float32"), 100.0)
    >>> source = engram.ArraySource({"a": engram.ArrayRecording({"eeg": eeg})})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(source, f"{folder}/store").store
    ...     windows = store.windows(FixedWindows(signal="eeg", window_size_s=2.0))
    ...     windows = windows.with_targets([0.1, 0.2, 0.3, 0.4, 0.5])
    ...     model = build_model("SCCNet", windows, {"drop_prob": 0.2})
    ...     model(windows.read([0, 1, 2]).X).shape
    ...     store.close()
    torch.Size([3, 1])
    """
    model_class = _model_class(name)
    checked = _checked_arguments(name, model_class, arguments or {})
    framing = framing or Framing()
    facts = _window_facts(name, windows)
    facts |= {
        "n_times": -(-facts["n_times"] // framing.downsample),
        "sfreq": facts["sfreq"] / framing.downsample,
    }
    if name in _OWN:
        facts = {
            key: value for key, value in facts.items() if key in inspect.signature(model_class).parameters
        }
    n_chans, n_times, n_outputs = windows.n_chans, windows.n_times, windows.n_outputs
    shown = f"windows of {n_chans} channels and {n_times} samples at {windows.sfreq:g} Hz"
    frame = _frame(windows, framing, has_constants=has_constants)
    # CPU only: the network is built there, and forking the devices' generators would start them.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = frame(model_class(**facts, **checked))
            out = _tried(model, n_chans, n_times)
        except Warning:
            raise  # somebody made warnings errors: it says what it is, and is no refusal
        # Networks refuse windows in whatever way their layers do: ValueError, RuntimeError, AssertionError,
        # ZeroDivisionError, IndexError, einops' own ...
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise InputError(
                f"{name} does not take {shown}: {reason}. "
                "Use longer windows, other arguments, or another model."
            ) from error
    if tuple(out.shape) != (2, n_outputs):
        raise InputError(
            f"{name} gives {tuple(out.shape)} for two {shown}, where (2, {n_outputs}) is needed. "
            "Use a model with one row of outputs per window."
        )
    return model


def _frame(windows: Windows, framing: Framing, *, has_constants: bool) -> Callable[[nn.Module], nn.Module]:
    """Make what puts layers before and behind a network."""
    layers: list[nn.Module] = []
    if framing.scaling == "window":
        layers.append(WindowScaling())
    if framing.scaling == "channel":
        layers.append(_channel_scaling(windows, has_constants=has_constants))
    if framing.downsample > 1:
        layers.append(Downsample(framing.downsample))
    if framing.reach is not None and windows.classes:
        raise InputError(f"reach={framing.reach} is for regression, and these are classes. Leave it out.")
    center = _mean_target(windows) if framing.reach is not None and has_constants else 0.0
    seconds_per_sample = 1 / windows.sfreq if isinstance(windows.index.target, TimeTo) else 0.0

    def frame(model: nn.Module) -> nn.Module:
        framed = nn.Sequential(*layers, model) if layers else model
        if framing.reach is not None:
            framed = Bounded(framed, center, framing.reach)
        if framing.test_shifts:
            framed = ShiftedMean(framed, framing.test_shifts, seconds_per_sample=seconds_per_sample)
        return framed

    return frame


def _mean_target(windows: Windows) -> float:
    targets = windows.index.targets(np.arange(len(windows)))
    if targets is None:
        raise InputError("These windows have no target. Give one, or use with_targets(values).")
    return float(np.mean(targets))


_N_SCALED, _SCALED_BYTES = 256, 32 << 20
"""Windows, evenly drawn from all, whose samples decide how channels are scaled: a quartile of fifty
thousand samples is known to some parts in a thousand. Fewer long windows, so that all are so many bytes."""


def _channel_scaling(windows: Windows, *, has_constants: bool) -> ChannelScaling:
    if not has_constants:
        return ChannelScaling(torch.zeros(windows.n_chans), torch.ones(windows.n_chans))
    n_scaled = max(1, min(_N_SCALED, _SCALED_BYTES // windows.batch_bytes(1)))
    numbers = np.unique(np.linspace(0, len(windows) - 1, n_scaled).astype(np.int64))
    X = next(iter(windows.read(numbers).signals.values())).float().numpy()  # noqa: N806 - braindecode's word
    low, middle, high = np.percentile(X, (25, 50, 75), axis=(0, 2))
    return ChannelScaling(torch.from_numpy(middle), torch.from_numpy(high - low))


_OWN: Mapping[str, type[nn.Module]] = {
    each.__name__: each for each in (BandPowerNet, MultiScaleNet, PatchAttentionNet, TimeLocalizer)
}


def _tried(model: nn.Module, n_chans: int, n_times: int) -> torch.Tensor:
    """Send two windows of zeros through a network, which stays as it was."""
    for layer, weights in model.named_parameters():
        # Pooling to nothing does not fail by itself: the output would be a constant.
        if not weights.numel():
            raise ValueError(f"no samples are left at its layer {layer.rpartition('.')[0]}")
    model.eval()
    with torch.no_grad():
        out = model(torch.zeros(2, n_chans, n_times))
    model.train()
    return torch.as_tensor(out)


def _model_classes() -> dict[str, Any]:
    try:
        import mne

        # braindecode 1.8 asks MNE 1.13 for a montage by its old name; theirs to mend. MNE tells
        # warnings to its log too, where the log is a file.
        with warnings.catch_warnings(), mne.use_log_level("ERROR"):
            warnings.filterwarnings("ignore", "Montage name 'standard_1020'", FutureWarning)
            from braindecode import models
    except ImportError as error:
        raise MissingExtra("braindecode", "eeg") from error
    return {
        name: found
        for name, found in inspect.getmembers(models, inspect.isclass)
        if issubclass(found, models.EEGModuleMixin) and found is not models.EEGModuleMixin
    }


def _model_class(name: str) -> type[nn.Module]:
    if name in _OWN:
        return _OWN[name]
    classes = _model_classes()
    if name in classes:
        found: type[nn.Module] = classes[name]
        return found
    raise InputError(f"There is no model {name!r}. {_nearest(name, {**_OWN, **classes})}")


def _checked_arguments(
    name: str, model_class: type[nn.Module], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Hold arguments against the class's signature, and look up the layers they name."""
    known = _parameters(model_class)
    checked: dict[str, Any] = {}
    for key, value in arguments.items():
        if key in _FILLED_IN:
            raise InputError(f"{key!r} of {name} is taken from the windows. Leave it out.")
        if key not in known:
            raise InputError(f"{name} has no argument {key!r}. {_nearest(key, known)}")
        default = known[key].default
        if inspect.isclass(default) and default is not inspect.Parameter.empty and isinstance(value, str):
            checked[key] = _layer(name, key, value)
        else:  # TOML knows lists only
            checked[key] = tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value
    return checked


def _parameters(model_class: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """List the arguments of a class, and of those that it passes ``**kwargs`` on to."""
    known: dict[str, inspect.Parameter] = {}
    for each in model_class.__mro__:
        if "__init__" not in vars(each):
            continue
        found = inspect.signature(vars(each)["__init__"]).parameters.values()
        known = {p.name: p for p in found if p.kind in _NAMED and p.name not in {"self", *_FILLED_IN}} | known
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found):
            break
    return known


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _layer(model: str, argument: str, name: str) -> type[nn.Module]:
    from braindecode import modules

    for home in (nn, modules):
        found = getattr(home, name, None)
        if inspect.isclass(found) and issubclass(found, nn.Module):
            return found
    layers = [key for key, value in {**vars(modules), **vars(nn)}.items() if inspect.isclass(value)]
    near = difflib.get_close_matches(name, layers, 1)
    raise InputError(
        f"{argument!r} of {model} is a layer of torch.nn or braindecode.modules; there is none named "
        f"{name!r}. Use {near[0] if near else 'ELU'!r}, for example."
    )


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    """Say which name may have been meant, whatever its case, or all that there are."""
    by_lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), by_lower, 1)
    return f"Did you mean {by_lower[near[0]]!r}?" if near else f"Use one of: {', '.join(sorted(names))}."


def _window_facts(name: str, windows: Windows) -> dict[str, Any]:
    """Say in braindecode's words what the windows are."""
    if len(windows.inputs) != 1:
        raise InputError(
            f"{name} reads one signal, these windows have {', '.join(windows.inputs)}. "
            "Ask for windows of one signal, or train a network of your own with engram.fit."
        )
    if windows.target_signal is not None:
        raise InputError(
            f"{name} predicts one row of outputs per window, and the target is the signal "
            f"{windows.target_signal!r}. Train a network of your own with engram.fit."
        )
    channels = _channels(windows)
    facts: dict[str, Any] = {
        "n_chans": windows.n_chans,
        "n_times": windows.n_times,
        "sfreq": windows.sfreq,
        "n_outputs": windows.n_outputs,
    }
    return facts | ({"chs_info": channels} if channels else {})


def _channels(windows: Windows) -> list[dict[str, Any]]:
    """Describe the channels as MNE's ``info["chs"]`` does; positions only where every one is known.

    Half of them as NaN would make every output of a network that reads positions NaN.
    """
    recording = windows.index.tables.ids[windows.index.locate(np.zeros(1, np.int64)).recording[0]]
    channels = windows.store.channels(recording, windows.inputs[0])
    places = np.array([[each[axis] for axis in ("x_m", "y_m", "z_m")] for each in channels], np.float64)
    described = [{"ch_name": each["channel"], "kind": each["type"]} for each in channels]
    if not np.isfinite(places).all():
        return described
    return [{**each, "loc": np.append(xyz, np.zeros(9))} for each, xyz in zip(described, places, strict=True)]


# ---------------------------------------------------------------- the ridge

_ALPHAS = np.logspace(0.0, 7.0, 15)
"""Penalties tried. Features are standardised, so these are in windows: 1 is nearly none, 1e7 nearly
the constant mean for any number of windows that fits."""

_VALUES_PER_WINDOW = 7
"""float64 values held per window and feature or output at the most: the features themselves and what
the singular value decomposition in ``RidgeCV`` allocates (measured: 6.1; scikit-learn 1.9)."""

_CHUNK_BYTES = 8 << 20
_FEWEST_WINDOWS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class RidgeSettings:
    """What the linear baseline sees, and what it may take.

    Raises
    ------
    InputError
        If a value is out of range.

    Examples
    --------
    >>> RidgeSettings(n_bins=20).memory
    '256 MB'
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    n_bins: int = 10
    """Stretches of equal length that a window is averaged in, per channel; fewer than its samples."""
    memory: int | str = "256 MB"
    """What fitting may hold at most, as bytes or text; more training windows than fit are left out by
    chance."""
    seed: int = 0
    """Decides which are left out."""

    def __post_init__(self) -> None:
        if self.n_bins < 1:
            raise InputError(f"A window cannot be averaged in n_bins={self.n_bins} stretches. Use 1 or more.")
        try:
            parse_bytes(self.memory)
        except ValueError as error:
            raise InputError(f"memory of the ridge: {error}") from error


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """A fitted ridge, as its predictions."""

    predictions: Mapping[str, NDArray[np.float32]]
    """Side (``"valid"``, ``"test"``, where there is one) -> (window, output) predictions, or (window,
    class) figures that sum to 1, of which the largest is the likeliest class. They are least-squares
    estimates, not calibrated probabilities."""
    n_windows: int
    """Training windows it was fitted on."""
    n_features: int
    """Features per window: channels times stretches."""
    alpha: float
    """The penalty that leave-one-out on the training windows chose."""
    note: str
    """All that in words."""


def fit_ridge(
    sides: SplitWindows, settings: RidgeSettings | None = None, *, memory: int | str | None = None
) -> RidgeFit:
    """Fit a ridge regression on coarse averages of the training windows, and predict the other sides.

    Each window is averaged in ``n_bins`` stretches of equal length per channel, every feature is
    standardised by the training windows, and scikit-learn's ``RidgeCV`` chooses the penalty by
    leave-one-out on the training windows alone. Classes are fitted as RidgeClassifier does, one
    output each, weighted so that every class counts the same.

    Parameters
    ----------
    sides
        Training windows with a target, and the sides to predict.
    settings
        What it sees and may take; None for the defaults.
    memory
        What the whole process may hold, as bytes or text; None: 80 % of what there is. Where that
        leaves less than ``settings.memory``, the half of it is taken, or a quarter, and so on.

    Returns
    -------
    RidgeFit
        Predictions, and what they rest on. The same for the same windows, settings and memory taken.

    Raises
    ------
    InputError
        If the windows have no target, or hold values that are not finite.
    DoesNotFit
        If so few windows fit in memory that a fit says nothing.
    MissingExtra
        If scikit-learn is not installed.

    Notes
    -----
    Memory is bounded whatever the number of windows: 56 bytes per training window and feature or
    output, windows left out until that fits, and a few batches of 8 MB.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> import engram
    >>> from engram.windows import FixedWindows
    >>> from engram.windows.splits import Side, Split
    >>> level = np.repeat(np.random.default_rng(0).normal(size=100), 50)
    >>> eeg = engram.ArraySignal(np.stack([level, -level], axis=1), 100.0)
    >>> source = engram.ArraySource({name: engram.ArrayRecording({"eeg": eeg}) for name in "ab"})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = engram.prepare(source, f"{folder}/store").store
    ...     windows = store.windows(FixedWindows(signal="eeg", window_size_s=0.5))
    ...     windows = windows.with_targets(np.tile(3 + level[::50], 2))
    ...     fitted = fit_ridge(windows.split(Split(test=Side(values=("b",)))))
    ...     store.close()
    >>> fitted.predictions["test"].shape, fitted.n_features
    ((100, 1), 20)
    >>> bool(np.allclose(fitted.predictions["test"][:, 0], 3 + level[::50], atol=0.05))
    True
    """
    settings = settings or RidgeSettings()
    train, n_classes = sides.train, len(sides.train.classes)
    first = train.read([0])
    n_features = _features(first, settings.n_bins).shape[1]
    n_outputs = _targets(first, n_classes).shape[1]
    ridge = _scaled_ridge()  # scikit-learn is part of what the process holds
    taken_bytes = _taken_bytes(settings, memory)
    numbers = _drawn(len(train), n_features + n_outputs, taken_bytes, settings.seed)
    x, y = np.empty((len(numbers), n_features)), np.empty((len(numbers), n_outputs))
    for rows, batch in _chunks(train, numbers):
        targets = _targets(batch, n_classes)
        if targets.shape[1] != n_outputs:
            raise InputError("The targets are signals of differing lengths. Leave the ridge out.")
        x[rows], y[rows] = _features(batch, settings.n_bins), targets
    ridge.fit(x, y, ridgecv__sample_weight=_class_weights(y) if n_classes else None)
    del x, y
    predictions = {
        side: _predicted(ridge, windows, n_outputs, settings.n_bins)
        for side, windows in {"valid": sides.valid, "test": sides.test}.items()
        if windows is not None
    }
    if n_classes:
        predictions = {side: _as_shares(values) for side, values in predictions.items()}
    alpha = float(ridge[-1].alpha_)
    left_out = (
        f" of {len(train):,}, drawn to fit {format_bytes(taken_bytes)}" if len(numbers) < len(train) else ""
    )
    note = (
        f"The ridge saw {n_features:,} features (averages in {settings.n_bins} stretches) of "
        f"{len(numbers):,} training windows{left_out}; alpha {alpha:g} by leave-one-out."
    )
    return RidgeFit(predictions, len(numbers), n_features, alpha, note)


def _taken_bytes(settings: RidgeSettings, memory: int | str | None) -> int:
    """Halve what fitting may hold until it fits beside what the process holds.

    All that is left would be another figure at every call, and with it another ridge.
    """
    left_bytes = Budget.of(memory).allowed_bytes - read_usage().unreclaimable_bytes
    taken_bytes = parse_bytes(settings.memory)
    while taken_bytes > max(0, left_bytes):
        taken_bytes //= 2
    return taken_bytes


def _drawn(n_windows: int, n_values: int, allowed_bytes: int, seed: int) -> NDArray[np.int64]:
    """Draw as many training windows as fit, sorted: (window,) int64."""
    window_bytes = n_values * 8 * _VALUES_PER_WINDOW
    n_fitting = allowed_bytes // window_bytes
    if n_fitting >= n_windows:
        return np.arange(n_windows)
    if n_fitting < _FEWEST_WINDOWS:
        raise DoesNotFit(
            f"A ridge on {n_values:,} features and outputs per window, for {_FEWEST_WINDOWS} windows. "
            "Give more memory, or leave the ridge out",
            resource="memory",
            needed_bytes=_FEWEST_WINDOWS * window_bytes,
            allowed_bytes=allowed_bytes,
        )
    draw = np.random.default_rng(seed)
    return np.sort(draw.choice(n_windows, n_fitting, replace=False))


def _chunks(windows: Windows, numbers: NDArray[np.int64]) -> Iterator[tuple[slice, Batch]]:
    """Read windows a few megabytes at a time, with the rows that they are."""
    if not len(numbers):
        return
    n_rows = max(1, _CHUNK_BYTES // windows.batch_bytes(1))
    for start in range(0, len(numbers), n_rows):
        part = numbers[start : start + n_rows]
        yield slice(start, start + len(part)), windows.read(part)


def _features(batch: Batch, n_bins: int) -> NDArray[np.float64]:
    """Average windows in stretches of equal length: (window, signal and channel and stretch)."""
    parts = []
    for name, tensor in batch.signals.items():
        # (window, channel, time) for channels, else (window, time, ...): time comes first here.
        samples = tensor.movedim(2, 1) if tensor.ndim == 3 else tensor
        lengths = batch.lengths[name].tolist()
        parts.append([_averaged(rows[:n].numpy(), n_bins) for rows, n in zip(samples, lengths, strict=True)])
    features = np.concatenate([np.stack(part) for part in parts], axis=1)
    if not np.isfinite(features).all():
        raise InputError("Windows hold values that are not finite. Leave such stretches out when preparing.")
    return features


def _averaged(samples: NDArray[Any], n_bins: int) -> NDArray[np.float64]:
    """Average (time, ...) samples in stretches; of fewer samples than stretches, some count twice."""
    starts = np.arange(n_bins) * len(samples) // n_bins
    widths = np.maximum(np.diff(starts, append=len(samples)), 1)
    sums = np.add.reduceat(samples.reshape(len(samples), -1), starts, axis=0, dtype=np.float64)
    return np.asarray(sums / widths[:, None]).ravel()


def _targets(batch: Batch, n_classes: int) -> NDArray[np.float64]:
    """Give (window, output) targets; a class is a one among zeros."""
    if batch.y is None:
        raise InputError("These windows have no target. Give one, or use with_targets(values).")
    if n_classes:
        return np.asarray(np.eye(n_classes)[batch.y.numpy()])
    return np.asarray(batch.y.numpy().reshape(len(batch), -1), np.float64)


def _class_weights(one_hot: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weigh windows so that every class that occurs counts the same; they average 1."""
    counts = one_hot.sum(axis=0)
    return np.asarray(len(one_hot) / np.count_nonzero(counts) / counts[one_hot.argmax(axis=1)])


def _as_shares(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut below 0 and divide by the sum, which is at least 1: outputs of one-hot targets sum to 1."""
    shares = np.maximum(values, 0.0)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _scaled_ridge() -> Any:
    try:
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise MissingExtra("scikit-learn", "torch") from error
    return make_pipeline(StandardScaler(copy=False), RidgeCV(alphas=_ALPHAS))


def _predicted(ridge: Any, windows: Windows, n_outputs: int, n_bins: int) -> NDArray[np.float32]:
    out = np.empty((len(windows), n_outputs), np.float32)
    for rows, batch in _chunks(windows, np.arange(len(windows))):
        out[rows] = ridge.predict(_features(batch, n_bins)).reshape(-1, n_outputs)
    return out
