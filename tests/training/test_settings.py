"""What a training may be told."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from engram.errors import InputError
from engram.training.settings import FitSettings


def test_the_defaults_are_valid_and_pinned() -> None:
    """Changing one changes every training that does not state it: a decision."""
    settings = FitSettings()
    assert (settings.epochs, settings.batch_size, settings.optimizer) == (10, 64, "adamw")
    assert (settings.learning_rate, settings.precision, settings.memory_share) == (1e-3, "32-true", 0.8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"devices": 0},
        {"mode": "random"},
        {"loss": "hinge"},
        {"optimizer": "lion"},
        {"scheduler": "step"},
        {"precision": "64"},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"l1": -1.0},
        {"epochs": "10"},
        {"epochs": 1.5},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.5},
        {"learning_rate": "1e-3"},
        {"huber_delta": 0.0},
        {"clip_norm": 0.0},
        {"patience": 0},
        {"noise": -1.0},
        {"channel_dropout": 1.5},
        {"time_mask_samples": -3},
        {"time_mask_samples": 2.5},
        {"memory_share": 1.5},
        {"memory_share": 0.0},
        {"memory": "much"},
        {"momentum": 0.9},
        {"scheduler": "onecycle", "warmup_epochs": 1.0},
        {"warmup_epochs": 10.0},
    ],
)
def test_a_value_that_breaks_its_rule_is_refused_by_name(wrong: dict[str, Any]) -> None:
    """The message begins with the field, says the value, and ends with a remedy."""
    with pytest.raises(InputError) as caught:
        FitSettings(**wrong)
    named = list(wrong)[-1]
    assert str(caught.value).startswith(named)
    assert str(wrong[named]).strip("'") in str(caught.value)


def test_settings_are_a_table_of_a_recipe() -> None:
    """Pydantic builds them from a dict and refuses a field that there is not."""
    adapter = TypeAdapter(FitSettings)
    assert adapter.validate_python({"epochs": 3, "memory": "2 GB"}) == FitSettings(epochs=3, memory="2 GB")
    with pytest.raises(ValidationError, match="epoch"):
        adapter.validate_python({"epoch": 3})
    everything = adapter.validate_python(
        {field.name: getattr(FitSettings(), field.name) for field in fields(FitSettings)}
    )
    assert everything == FitSettings()
