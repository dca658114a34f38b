"""Readers side by side: the same windows of the same recordings, each reader at its best settings.

What is compared: how fast float32 tensors (window, channel, time) of 64 windows come out of float16
recordings on disk, in a global shuffle or the closest that a reader offers.

- ``corpus`` decides the recordings and their windows, and holds the truth that every reader is
  checked against.
- ``reader`` decides what a reader has to do, ``readers`` holds one file per library.
- ``cell`` measures one reader in a process of its own, ``run`` puts the cells in order and under
  their memory limits, ``machine`` measures what the machine itself can do.
- ``results`` makes rows, ratios and files of it, ``page`` the table and the plot of the
  documentation.

``python -m benchmarks.loading --help`` from the repository's root.
"""
