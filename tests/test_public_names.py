"""What others may build on is named, sorted, documented and pinned."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import engram
from engram import errors

MODULES = [
    "engram",
    *(
        found.name
        for found in pkgutil.walk_packages(engram.__path__, "engram.")
        # The one runs on import; the other is C, and not there without a compiler.
        if found.name not in ("engram.__main__", "engram.store._native")
    ),
]

# Changing either is a decision and brings a fragment: people type these names.
NAMES = [
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

ERRORS = {
    "DoesNotFit": ["EngramError"],
    "EngramError": ["Exception"],
    "InputError": ["EngramError", "ValueError"],
    "MemoryExceeded": ["EngramError", "MemoryError"],
    "MissingExtra": ["EngramError", "ImportError"],
    "SourceError": ["EngramError"],
    "StoreDamaged": ["EngramError"],
    "StoreFormatError": ["EngramError", "ValueError"],
    "StoreLocked": ["EngramError", "BlockingIOError"],
    "StoreMissing": ["EngramError", "FileNotFoundError"],
    "StoreNotWritable": ["EngramError", "OSError"],
    "WorkerLost": ["EngramError", "RuntimeError"],
}


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    """Return every module of Engram in turn."""
    return importlib.import_module(request.param)


def test_the_face_is_pinned() -> None:
    """``engram`` offers these names and no others, at most twenty; ``dir(engram)`` shows them."""
    assert engram.__all__ == NAMES
    assert len(NAMES) <= 20
    assert set(NAMES) <= set(dir(engram))


def test_the_error_tree_is_pinned() -> None:
    """The error classes and what each derives from are those that the documentation draws."""
    tree = {name: [base.__name__ for base in getattr(errors, name).__bases__] for name in errors.__all__}
    assert tree == ERRORS


def test_all_is_true(module: ModuleType) -> None:
    """``__all__`` names each thing once, and every name in it exists; ruff keeps it sorted (RUF022)."""
    names = list(getattr(module, "__all__", []))
    assert len(names) == len(set(names))
    assert [name for name in names if not hasattr(module, name)] == []


def test_a_module_with_public_names_says_which(module: ModuleType) -> None:
    """A module that defines a public function or class lists its public names in ``__all__``."""
    defined = [name for name, value in vars(module).items() if _is_public(module, name, value)]
    assert not defined or hasattr(module, "__all__"), defined


def test_every_public_name_is_documented(module: ModuleType) -> None:
    """Every public function and class, and every public method of one, has a docstring of its own."""
    undocumented = []
    for name, value in vars(module).items():
        if _is_public(module, name, value):
            undocumented += [name] * (not (value.__doc__ or "").strip())
            undocumented += [f"{name}.{member}" for member in _undocumented_members(value)]
    assert undocumented == []


def test_every_field_of_a_public_value_has_its_sentence(module: ModuleType) -> None:
    """Below each field of a public dataclass stands a sentence that says what it holds."""
    text = Path(inspect.getfile(module)).read_text(encoding="utf-8")
    bare = [
        f"{node.name}.{name}"
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and _is_dataclass(node)
        for name in _bare_fields(node)
    ]
    assert bare == []


def _is_public(module: ModuleType, name: str, value: object) -> bool:
    """Tell whether a module's name is a public function or class that this module defines."""
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    return is_code and not name.startswith("_") and value.__module__ == module.__name__


def _undocumented_members(value: object) -> list[str]:
    """Name the public methods and properties, defined in this class, that say nothing."""
    if not inspect.isclass(value):
        return []
    return [
        name
        for name, member in vars(value).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod))
        and not (member.__doc__ or "").strip()
    ]


def _is_dataclass(node: ast.ClassDef) -> bool:
    """Tell whether a class statement is decorated as a dataclass."""
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _bare_fields(node: ast.ClassDef) -> list[str]:
    """Name the public fields of a class statement without a string beneath them; class variables are none."""
    follow = [*node.body[1:], None]
    return [
        ast.unparse(statement.target)
        for statement, after in zip(node.body, follow, strict=True)
        if isinstance(statement, ast.AnnAssign)
        and not ast.unparse(statement.annotation).startswith("ClassVar")
        and not ast.unparse(statement.target).startswith("_")
        and not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant))
    ]
