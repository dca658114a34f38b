"""Make ``import torchaudio`` work beside a torch that its wheel was not built for.

braindecode imports torchaudio for a few functions written in Python. The torchaudio wheel
on the package index is linked against the CUDA build of torch: beside a CPU-only torch its
native library cannot be loaded, and torchaudio lets that failure end the import. Where the
library's file is absent, torchaudio notices and goes on without it. So: if the import
fails, and only then, that one file is removed. A torchaudio that imports is left as it is.

Run by ``make setup`` with the Python of the environment to mend.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Mend the environment of this Python; return 0 where torchaudio imports or is absent."""
    # Finding a top-level package does not run it, so this works while the import fails.
    spec = importlib.util.find_spec("torchaudio")
    if spec is None or spec.origin is None:
        return 0
    error = _import_error()
    for library in Path(spec.origin).parent.glob("lib/_torchaudio*.so"):
        if library.name in error:
            library.unlink()
            print(f"torchaudio could not load {library.name} beside this torch: removed it.")
            error = _import_error()
    if error:
        print(f"torchaudio cannot be imported, so braindecode cannot either:\n{error}", file=sys.stderr)
    return int(bool(error))


def _import_error() -> str:
    """Import torchaudio in a fresh process; return what it said on failing, or nothing."""
    # A fresh process, since a failed import of torchaudio leaves half of it in sys.modules.
    process = subprocess.run(
        [sys.executable, "-c", "import torchaudio"], capture_output=True, text=True, check=False
    )
    return process.stderr if process.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
