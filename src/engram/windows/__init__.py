"""Which windows there are, as compact integers.

``spec`` says what is asked for, ``targets`` what is predicted, ``tables`` what is known of the
recordings; ``index`` works out every admissible window and what was refused, with ``cutting`` for where
windows lie and ``admission`` for which are admitted; ``splits`` parts them into sides, ``order`` says
which make up a batch. Numbers in, numbers out: nothing here opens a file.
"""

from engram.windows.index import Column, Located, WindowIndex, WindowRefusal, build_index
from engram.windows.order import Cursor, Mode, Order
from engram.windows.spec import EventWindows, FixedWindows, Span
from engram.windows.splits import Side, Sides, Split, split_index
from engram.windows.tables import SignalTable, Tables
from engram.windows.targets import EventColumn, RecordingColumn, SignalTarget, Target, TimeTo

__all__ = [
    "Column",
    "Cursor",
    "EventColumn",
    "EventWindows",
    "FixedWindows",
    "Located",
    "Mode",
    "Order",
    "RecordingColumn",
    "Side",
    "Sides",
    "SignalTable",
    "SignalTarget",
    "Span",
    "Split",
    "Tables",
    "Target",
    "TimeTo",
    "WindowIndex",
    "WindowRefusal",
    "build_index",
    "split_index",
]
