"""Engram trains models on brain recordings that do not fit in memory.

The face: every public name is here, each loaded when it is first used, so that importing
``engram`` loads no heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.preparation.ingest import Prepared, prepare
    from engram.recordings import as_source
    from engram.recordings.bids import BidsSource
    from engram.recordings.files import FileSource
    from engram.recordings.objects import ArrayRecording, ArraySignal, ArraySource
    from engram.store.reader import Store
    from engram.store.reader import Store as open  # noqa: A004, N813 - engram.open(path), as in zarr.open
    from engram.store.verify import verify
    from engram.training.fit import fit
    from engram.training.settings import FitSettings
    from engram.windows.spec import EventWindows, FixedWindows
    from engram.windows.splits import Side, Split

__version__ = "0.1.0.dev0"

__all__ = [
    "ArrayRecording",
    "ArraySignal",
    "ArraySource",
    "BidsSource",
    "EventWindows",
    "FileSource",
    "FitSettings",
    "FixedWindows",
    "Prepared",
    "Side",
    "Split",
    "Store",
    "__version__",
    "as_source",
    "fit",
    "open",
    "prepare",
    "verify",
]

_HOMES = {
    "ArrayRecording": "recordings.objects",
    "ArraySignal": "recordings.objects",
    "ArraySource": "recordings.objects",
    "BidsSource": "recordings.bids",
    "EventWindows": "windows.spec",
    "FileSource": "recordings.files",
    "FitSettings": "training.settings",
    "FixedWindows": "windows.spec",
    "Prepared": "preparation.ingest",
    "Side": "windows.splits",
    "Split": "windows.splits",
    "Store": "store.reader",
    "as_source": "recordings",
    "fit": "training.fit",
    "open": "store.reader:Store",
    "prepare": "preparation.ingest",
    "verify": "store.verify",
}
"""Where each name is defined, below ``engram``."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engram' has no attribute {name!r}")
    module, _, other = _HOMES[name].partition(":")
    value = getattr(import_module(f"engram.{module}"), other or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
