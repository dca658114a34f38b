"""Batches: windows of a store as tensors, for a plain loop, ``DataLoader``, skorch and Lightning.

``reading`` fills arrays with samples, ``batch`` gives them names, ``windows`` joins an index with
its store, ``loader`` walks through an order within a memory budget, ``dataset`` fits PyTorch's own
``DataLoader``.
"""

from engram.batches.batch import Batch
from engram.batches.dataset import WindowDataset, WindowStream
from engram.batches.loader import Loader
from engram.batches.windows import SplitWindows, Windows

__all__ = ["Batch", "Loader", "SplitWindows", "WindowDataset", "WindowStream", "Windows"]
