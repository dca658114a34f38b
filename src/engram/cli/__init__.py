"""The command line: parse, call, print, exit code.

``app`` holds the program itself and its exit codes, ``stores`` and ``trainings`` the
commands by what they work on, ``bench`` the one that measures, ``screen`` how things are shown.
"""

from engram.cli import bench, stores, trainings
from engram.cli.app import app, main

__all__ = ["app", "bench", "main", "stores", "trainings"]
