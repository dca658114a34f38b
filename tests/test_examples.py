"""The examples do what they say, wherever they are started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

# In a process of its own: nbclient starts a kernel, an event loop and sockets.
EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

NotebookClient(nbformat.read(sys.argv[1], as_version=4), kernel_name="python3", timeout=500).execute()
"""

# The start of a path from a root: of a POSIX file system or of a Windows drive.
ABSOLUTE = re.compile(r"""(?:^|[\s"'(=:,])/[\w.-]+/|\b[A-Za-z]:\\""", re.MULTILINE)


def run_python(folder: Path, *arguments: str | Path, **surroundings: str) -> None:
    """Run Python in a folder, in one thread."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | surroundings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_keeps_its_claims_and_writes_where_it_is_told(script: Path, tmp_path: Path) -> None:
    """A script's assertions hold, in any folder, and nothing is left outside the one it is given."""
    run_python(tmp_path, script, "files")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, tmp_path: Path) -> None:
    """Every cell of a notebook runs without an error in a fresh kernel."""
    # Settings of the user's own may start other kernels, or other code in them.
    own = {name: str(tmp_path / name) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    run_python(tmp_path, "-c", EXECUTE, notebook, **own)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.name)
def test_what_a_notebook_shows_was_run_in_order_and_names_no_machine(notebook: Path) -> None:
    """Stored outputs come from one pass, hold no warning or error, and no path from a root."""
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if code_of(cell)]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for kind, text in outputs(cells):
        assert kind in {"stdout", "display_data", "execute_result"}, text
        assert not ABSOLUTE.search(text), text


@pytest.mark.parametrize("text", ["in /home/me/store", "('/tmp/a/b')", "C:\\data", "/root/x"])
def test_paths_from_a_root_are_found(text: str) -> None:
    """A path from a root is found in quotes, in brackets and at the start of a line."""
    assert ABSOLUTE.search(text)


def code_of(cell: dict[str, Any]) -> str:
    """Return the code of a code cell, else nothing."""
    return "".join(cell["source"]) if cell["cell_type"] == "code" else ""


def outputs(cells: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the kind and the text of every output."""
    for cell in cells:
        for output in cell["outputs"]:
            shown = output.get("data", {})
            texts = [output.get("text", ""), *(shown[kind] for kind in shown if kind.startswith("text/"))]
            yield output.get("name", output["output_type"]), "\n".join("".join(text) for text in texts)
