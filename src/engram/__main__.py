"""``python -m engram``: the command line."""

from engram.cli import main

main()
