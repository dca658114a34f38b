"""The backends that there are, held to what every backend promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram.errors import InputError
from engram.store.backend import BACKENDS, open_backend
from engram.testing.backends import BackendConformance


class TestZarrBackend(BackendConformance):
    """Files where they lie."""

    name = "zarr"


class TestRamBackend(BackendConformance):
    """Parts in memory."""

    name = "ram"


def test_every_known_backend_is_tested_here() -> None:
    """A backend that is added is added to these tests."""
    assert set(BACKENDS) == {TestZarrBackend.name, TestRamBackend.name}


def test_an_unknown_backend_is_refused_with_those_there_are(tmp_path: Path) -> None:
    """By name."""
    with pytest.raises(InputError, match=r"Unknown backend 'tape'. Use one of: ram, zarr"):
        open_backend("tape", tmp_path)
