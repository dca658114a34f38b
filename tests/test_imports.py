"""Importing Engram is cheap, and does nothing."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

import engram

HEAVY = {
    "braindecode",
    "dask",
    "h5py",
    "joblib",
    "lightning",
    "matplotlib",
    "mne",
    "pandas",
    "scipy",
    "sklearn",
    "torch",
    "zarr",
}

OWN = {
    "engram.batches": {"torch"},
    # Lightning loads torchmetrics, and that SciPy and Matplotlib.
    "engram.tasks": {"torch", "lightning", "scipy", "matplotlib"},
    "engram.training": {"torch", "lightning", "scipy", "matplotlib"},
}
"""Rooms that are made of a heavy library, and what that brings along."""

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(engram.__path__, "engram.")
    if module.name != "engram.__main__"  # it runs on import
)


def heavy_after(statement: str, arguments: Sequence[str] = ()) -> set[str]:
    """Run a statement in a fresh process; return the heavy libraries that it has loaded."""
    code = "\n".join(
        [
            "import json, sys",
            f"sys.argv = {['engram', *arguments]!r}",
            "try:",
            f"    {statement}",
            "except SystemExit as end:",
            "    assert not end.code, end.code",
            "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))",
        ]
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return HEAVY & set(json.loads(process.stdout.splitlines()[-1]))


def test_import_engram_loads_no_heavy_library() -> None:
    """``import engram`` takes what a script pays for at its first line: nothing heavy."""
    assert heavy_after("import engram") == set()


def test_help_loads_no_heavy_library() -> None:
    """``engram --help`` answers without loading what it does not need to answer."""
    assert heavy_after("from engram.cli import main; main()", ["--help"]) == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_loads_heavy_libraries_on_use_only(module: str) -> None:
    """Importing a module loads no heavy library but its room's own; the function that needs one does."""
    room = ".".join(module.split(".")[:2])
    assert heavy_after(f"import {module}") <= OWN.get(room, set())


@pytest.mark.parametrize("name", ["Store", "open", "prepare"])
def test_the_face_reads_stores_without_torch(name: str) -> None:
    """Preparing and opening a store load no torch, though a store has a method that gives tensors."""
    assert "torch" not in heavy_after(f"from engram import {name}")
