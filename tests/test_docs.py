r"""What the documentation says to type works.

Every fenced ``python`` block of the README and of ``docs/`` runs, and so does every line
``$ engram ...`` of a ``console`` block: page by page, from top to bottom, in one namespace
and one empty folder. A ``toml`` block with a title is saved there under that name. A block that
cannot run says why on its fence: ``\`\`\`python {no-run="needs a cluster"}``.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest

from engram.store.tables import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)```(python|console|toml(?= title=))\b(.*)\n((?s:.*?))^\1```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block that says something to run."""

    language: str
    code: str
    line: int
    title: str = ""


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page that are to be run, from top to bottom."""
    text = page.read_text(encoding="utf-8")
    for fence in FENCE.finditer(text):
        _, language, options, code = fence.groups()
        if not re.search(r'no-run="[^"]+"', options):
            title = re.search(r'title="([^"]+)"', options)
            line = text.count("\n", 0, fence.start(4))
            yield Block(language, dedent(code), line, title[1] if title else "")


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if any(blocks(page))]


PROGRAM = """
import json, shlex, subprocess, sys

page, steps = json.loads(sys.stdin.read())
namespace = {"__name__": "__main__"}
for line, code, commands in steps:
    # Blank lines above, so that a traceback names the line of the page.
    exec(compile("\\n" * line + code, page, "exec"), namespace)
    for words in commands:
        print("$", shlex.join(words), flush=True)
        subprocess.run([sys.executable, "-m", *words], check=True, stdin=subprocess.DEVNULL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    """A reader who types a page from top to bottom, in a fresh Python, meets no error."""
    steps = [(block.line, python(block), commands(block)) for block in blocks(page)]
    told = json.dumps([str(page), steps])
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=told, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr


def python(block: Block) -> str:
    """Return what Python runs of a block: its code, or for a titled file the saving of it."""
    if block.language == "toml":
        return f"__import__('pathlib').Path({block.title!r}).write_text({block.code!r}, encoding='utf-8')"
    return block.code if block.language == "python" else ""


def commands(block: Block) -> list[list[str]]:
    """Return the words of each ``$ engram`` line; a backslash at the end joins two lines."""
    if block.language != "console":
        return []
    lines = block.code.replace("\\\n", " ").splitlines()
    return [shlex.split(line[1:], comments=True) for line in lines if line.startswith("$ engram")]


def test_blocks_are_found_in_order_and_reasons_respected(tmp_path: Path) -> None:
    """Indented blocks are found, other languages are not, and a stated reason keeps a block from running."""
    page = tmp_path / "page.md"
    page.write_text(
        "text\n```python\na = 1\n```\n"
        "    ```console\n    $ engram a \\\n        b\n    output\n    $ ls\n    ```\n"
        '```python {no-run="needs a cluster"}\nfail()\n```\n```toml\nx\n```\n'
        '```toml title="recipe.toml"\nname = "x"\n```\n'
    )
    first, console, recipe = blocks(page)
    assert (first.language, python(first), first.line) == ("python", "a = 1\n", 2)
    assert commands(console) == [["engram", "a", "b"]]
    assert (recipe.title, recipe.code) == ("recipe.toml", 'name = "x"\n')


@pytest.mark.parametrize("table", SCHEMAS)
def test_the_format_page_names_every_column(table: str) -> None:
    """The specification of the store's format lists each table with all of its columns."""
    text = (ROOT / "docs" / "reference" / "store-format.md").read_text(encoding="utf-8")
    section = text.partition(f"### {table}\n")[2].partition("\n##")[0]
    assert [name for name in SCHEMAS[table].names if f"`{name}`" not in section] == []
