"""Comparing stores byte for byte: what "the same store" means in tests."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engram.store.format import LOCK

__all__ = ["digest"]


def digest(store: Path) -> dict[str, str]:
    """Give the SHA-256 of every file of a store, by its relative path; the lock is no part of it."""
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != LOCK
    }
