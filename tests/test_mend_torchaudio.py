"""The set-up removes one file of torchaudio where that file keeps it from being imported, and only there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "mend_torchaudio.py"
NEEDS_LIBRARY = """
from pathlib import Path
for library in (Path(__file__).parent / "lib").glob("_torchaudio*.so"):
    raise OSError(f"Could not load this library: {library}")
"""


def mend(tmp_path: Path, init: str) -> tuple[int, bool]:
    """Run the script beside such a torchaudio; return its status, and whether the file is left."""
    library = tmp_path / "torchaudio" / "lib" / "_torchaudio.abi3.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "torchaudio" / "__init__.py").write_text(init)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run([sys.executable, SCRIPT], env=environment, check=False, capture_output=True)
    return process.returncode, library.exists()


@pytest.mark.parametrize(
    ("init", "status", "is_left"),
    [
        pytest.param("", 0, True, id="imports"),
        pytest.param(NEEDS_LIBRARY, 0, False, id="library cannot be loaded"),
        pytest.param("import no_such_module", 1, True, id="fails for another reason"),
    ],
)
def test_the_library_is_removed_only_where_it_is_the_reason(
    tmp_path: Path, init: str, status: int, is_left: bool
) -> None:
    """A torchaudio that imports is left alone; one that fails otherwise is reported, not mutilated."""
    assert mend(tmp_path, init) == (status, is_left)
