"""Budget: how much memory a job may hold, and what has been planned with it, line by line.

Arithmetic on frozen values: planning spends, nothing is allocated here. Only the default,
where nobody states a size, asks ``engram.memory.limits`` and ``usage`` for this machine's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from engram.errors import DoesNotFit, InputError
from engram.units import format_bytes, parse_bytes

__all__ = ["Budget", "Spending"]

# Of what there is, four fifths: the share at which Dask's workers pause as well
# (distributed.worker.memory.pause), and room for what is held between two readings.
_DEFAULT_SHARE = (4, 5)


@dataclass(frozen=True, slots=True)
class Spending:
    """One line of a budget.

    Raises
    ------
    InputError
        If the size is negative.
    """

    name: str
    """What the memory is for, in words that a person understands."""
    n_bytes: int
    """The most that it will hold at any time."""

    def __post_init__(self) -> None:
        if self.n_bytes < 0:
            raise InputError(f"{self.name!r} cannot take {self.n_bytes} bytes. Use 0 or more.")


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that a process tree may hold, and named lines of what it plans to hold.

    The figure stands for unreclaimable memory of the whole tree (`engram.memory.Usage`),
    the interpreter and its libraries included.

    Raises
    ------
    InputError
        If nothing is allowed.
    DoesNotFit
        If the lines together exceed what is allowed.

    Examples
    --------
    >>> budget = Budget.of("1 GiB").spend("libraries", 180 << 20).spend("one block", 300 << 20)
    >>> budget.left_bytes == (1024 - 480) << 20
    True
    >>> print(budget)
    memory budget  1.0 GiB
      libraries    180 MiB
      one block    300 MiB
      left         544 MiB
    >>> budget.spend("filter", 600 << 20)
    Traceback (most recent call last):
    ...
    engram.errors.DoesNotFit: 'filter' (600 MiB) does not fit beside 'libraries' (180 MiB), \
'one block' (300 MiB); most goes to 'filter'. \
Raise the memory budget to at least 1133 MB (memory: needs 1.1 GiB, allowed 1.0 GiB)
    """

    allowed_bytes: int
    """What the tree may hold."""
    spendings: tuple[Spending, ...] = ()
    """What it plans to hold, in the order it was planned."""
    origin: str = ""
    """Where the allowance comes from, if nobody stated it."""

    def __post_init__(self) -> None:
        if self.allowed_bytes <= 0:
            raise InputError(f"A memory budget of {self.allowed_bytes} bytes holds nothing. Write '2 GB'.")
        if self.left_bytes < 0:
            raise self._does_not_fit()

    @classmethod
    def of(cls, size: int | str | None) -> Self:
        """Make a budget from a size, or from what this machine leaves.

        Parameters
        ----------
        size
            Bytes, or text such as ``"2 GB"``. ``None``: 80 % of what the limit that binds
            leaves free together with what this process tree already holds.

        Raises
        ------
        InputError
            If the size is none, or (for ``None``) a limit cannot be understood.
        """
        if size is None:
            return cls._of_what_is_free()
        try:
            return cls(parse_bytes(size))
        except ValueError as error:
            raise InputError(str(error)) from error

    @classmethod
    def _of_what_is_free(cls) -> Self:
        # Here and not above: all but this default is arithmetic, and reads no machine.
        from engram.memory import limits, usage

        limit = limits.binding_limit()
        available_bytes = limit.free_bytes + usage.read_usage().unreclaimable_bytes
        part, whole = _DEFAULT_SHARE
        origin = f"{part / whole:.0%} of {format_bytes(available_bytes)} ({limit.kind}: {limit.where})"
        return cls(available_bytes * part // whole, origin=origin)

    @property
    def spent_bytes(self) -> int:
        """What all lines take together."""
        return sum(spending.n_bytes for spending in self.spendings)

    @property
    def left_bytes(self) -> int:
        """What no line has taken."""
        return self.allowed_bytes - self.spent_bytes

    def spend(self, name: str, n_bytes: int) -> Self:
        """Add a line.

        Parameters
        ----------
        name
            What the memory is for.
        n_bytes
            The most that it will hold at any time.

        Returns
        -------
        Budget
            A new one; this one stays as it is.

        Raises
        ------
        DoesNotFit
            If less than that is left.
        InputError
            If ``n_bytes`` is negative.
        """
        return replace(self, spendings=(*self.spendings, Spending(name, n_bytes)))

    def __str__(self) -> str:
        lines = [("memory budget", self.allowed_bytes)]
        lines += [(f"  {spending.name}", spending.n_bytes) for spending in self.spendings]
        lines += [("  left", self.left_bytes)]
        width = max(len(name) for name, _ in lines)
        table = [f"{name:<{width}}  {format_bytes(n_bytes):>7}" for name, n_bytes in lines]
        if self.origin:
            table[0] += f"  ({self.origin})"
        return "\n".join(table)

    def _does_not_fit(self) -> DoesNotFit:
        *before, last = self.spendings
        largest = max(self.spendings, key=lambda spending: spending.n_bytes)
        beside = f" beside {', '.join(map(_quoted, before))}; most goes to {largest.name!r}" if before else ""
        # Megabytes, rounded up: a figure that can be typed in, and is not short by a rounding.
        remedy = f"Raise the memory budget to at least {-(-self.spent_bytes // 10**6)} MB"
        return DoesNotFit(
            f"{_quoted(last)} does not fit{beside}. {remedy}",
            resource="memory",
            needed_bytes=self.spent_bytes,
            allowed_bytes=self.allowed_bytes,
        )


def _quoted(spending: Spending) -> str:
    return f"{spending.name!r} ({format_bytes(spending.n_bytes)})"
