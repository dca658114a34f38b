from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from engram.errors import InputError
from engram.windows.spec import EventWindows, FixedWindows, Span


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"window_size_s": 1.0, "window_size_samples": 100}, "say the same twice"),
        ({"window_size_s": 0.0}, "above zero"),
        ({"window_size_samples": -1}, "above zero"),
        ({"window_size_samples": 2.0}, "Use window_size_s"),
        ({"window_size_samples": True}, "Use window_size_s"),
        ({"window_size_s": float("nan")}, "finite"),
        ({"window_stride_s": 1.0}, "without a window size"),
        ({"window_size_s": 1.0, "window_stride_samples": 0}, "above zero"),
        ({"start_offset_s": -0.1}, "before the recording"),
        ({"stop_offset_s": 0.0}, "above zero"),
        ({"beside": (Span(signal="eeg"),)}, "name one twice"),
        ({"where": {"task": "RestingState"}}, r"\('RestingState',\)"),
        ({"where": {"task": ()}}, "names nothing"),
        ({"where": ("task",)}, "no mapping"),
        ({"window_size_s": 1.0, "crop_s": 0.5, "crop_samples": 50}, "say the same twice"),
        ({"window_size_s": 1.0, "crop_samples": 0}, "crop is 0, and must be above zero"),
        ({"window_size_s": 1.0, "shift_s": -0.1}, "shift is -0.1, and must be above zero"),
        ({"crop_s": 0.5}, "A crop is given without a length"),
        (
            {"window_size_s": 1.0, "shift_s": 0.1, "beside": (Span(signal="emg"),)},
            "cannot be cropped or shifted",
        ),
        ({"excluding": {"subject": "A"}}, r"excluding\['subject'\]='A' is not a tuple"),
    ],
)
def test_fixed_windows_refuse_what_cannot_be_meant(settings: dict[str, Any], said: str) -> None:
    """An amount told twice, of no length, or a stride over nothing is refused where it is written."""
    with pytest.raises(InputError, match=said):
        FixedWindows(signal="eeg", **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"anchor": "square"}, r"\('square',\)"),
        ({"anchor": ()}, "names nothing"),
        ({"anchor": (1,)}, "not a tuple of names"),
        ({"trial_start_offset_s": 0.5, "trial_start_offset_samples": 50}, "say the same twice"),
        ({"trial_duration_s": 0.0}, "above zero"),
        ({"trial_duration_s": "1"}, "trial_duration_s='1' is not a finite number"),
        ({"window_stride_samples": 10}, "without a window size"),
    ],
)
def test_event_windows_refuse_what_cannot_be_meant(settings: dict[str, Any], said: str) -> None:
    """An anchor is a tuple of descriptions; its amounts are told once and have a length."""
    with pytest.raises(InputError, match=said):
        EventWindows(**{"signal": "eeg", "anchor": ("square",), **settings})


def test_offsets_may_be_negative() -> None:
    """A trial or a span may begin before its anchor."""
    spec = EventWindows(
        signal="eeg",
        anchor=("square",),
        trial_start_offset_s=-0.2,
        beside=(Span(signal="stim", offset_samples=-32, window_size_samples=33),),
    )
    assert spec.signals == ("eeg", "stim")


def test_where_is_kept_sorted_and_apart_from_the_callers() -> None:
    """Two mappings that mean the same are the same spec, and changing one later changes no spec."""
    where = {"task": ("RestingState",), "release": ("R1",)}
    spec = FixedWindows(signal="eeg", where=where)
    where["release"] = ("R2",)
    assert list(spec.where.items()) == [("release", ("R1",)), ("task", ("RestingState",))]


def test_a_recipe_makes_specs_and_refuses_unknown_names() -> None:
    """pydantic builds the specs from a recipe's lists and tables; a mistyped name is an error."""
    recipe = TypeAdapter(EventWindows)
    written = {
        "signal": "robs",
        "anchor": ["square"],
        "window_size_samples": 1,
        "beside": [{"signal": "stim", "offset_samples": -32, "window_size_samples": 33}],
        "where": {"task": ["attention"]},
    }
    assert recipe.validate_python(written) == EventWindows(
        signal="robs",
        anchor=("square",),
        window_size_samples=1,
        beside=(Span(signal="stim", offset_samples=-32, window_size_samples=33),),
        where={"task": ("attention",)},
    )
    with pytest.raises(ValidationError, match="window_sise_s"):
        recipe.validate_python({**written, "window_sise_s": 1.0})
    with pytest.raises(ValidationError, match="above zero"):
        recipe.validate_python({**written, "window_size_samples": 0})
