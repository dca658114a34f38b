"""From content to a page: the templates, and the file.

Every page has the same frame, which loads nothing, and shows tables and figures the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from engram.atomic import replacing
from engram.errors import MissingExtra

__all__ = ["write_page"]


def write_page(out: Path, template: str, content: Mapping[str, Any]) -> Path:
    """Write a page, whole or not at all.

    Parameters
    ----------
    out
        The file; one of this name is replaced.
    template
        Name of a template of this folder.
    content
        What the template names.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    MissingExtra
        If Jinja is not installed.
    """
    try:
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    except ImportError as error:
        raise MissingExtra("jinja2", "report") from error
    # Escaping is always on: names of recordings, classes and settings are a stranger's text.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: files(__package__).joinpath(name).read_text("utf-8")),
    )
    page = environment.get_template(template).render(content)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        # A name that is no Unicode text (from a file system that is not) becomes "?", not an error.
        file.write(page.encode("utf-8", errors="replace"))
    return out
