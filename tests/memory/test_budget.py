import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import DoesNotFit, InputError
from engram.memory import limits, usage
from engram.memory.budget import Budget, Spending
from engram.memory.limits import Limit
from engram.memory.usage import Usage

# Primes, so that a sum shows each of its terms.
LIBRARIES, BLOCK, FILTER = 13_000_027, 29_000_039, 47_000_059

sizes = st.integers(0, 2**50)
lines = st.lists(st.tuples(st.text(max_size=5), sizes), max_size=8)


@given(allowed_bytes=st.integers(1, 2**52), lines=lines)
def test_spending_is_a_running_sum_against_what_is_allowed(
    allowed_bytes: int, lines: list[tuple[str, int]]
) -> None:
    """A line is taken exactly as long as the sum of all lines stays within what is allowed."""
    budget, spent_bytes = Budget(allowed_bytes), 0
    for name, n_bytes in lines:
        if spent_bytes + n_bytes > allowed_bytes:
            with pytest.raises(DoesNotFit) as refusal:
                budget.spend(name, n_bytes)
            assert refusal.value.needed_bytes == spent_bytes + n_bytes
            assert refusal.value.allowed_bytes == allowed_bytes
        else:
            budget, spent_bytes = budget.spend(name, n_bytes), spent_bytes + n_bytes
            assert budget.spendings[-1] == Spending(name, n_bytes)
        assert budget.spent_bytes == spent_bytes
        assert budget.spent_bytes + budget.left_bytes == allowed_bytes


def test_spending_leaves_the_budget_as_it_was() -> None:
    """`spend` gives a new budget: two plans can be made from one."""
    budget = Budget(100_000_007).spend("libraries", LIBRARIES)
    assert budget.spend("block", BLOCK).spent_bytes == LIBRARIES + BLOCK
    assert budget.spend("filter", FILTER).spent_bytes == LIBRARIES + FILTER
    assert budget.spendings == (Spending("libraries", LIBRARIES),)


def test_what_does_not_fit_is_named_beside_every_line_and_the_largest() -> None:
    """The refusal names the line, all others, the largest, the figures, and one sufficient remedy."""
    allowed_bytes = LIBRARIES + BLOCK + FILTER - 1
    budget = Budget(allowed_bytes).spend("filter", FILTER).spend("libraries", LIBRARIES)
    with pytest.raises(DoesNotFit) as refusal:
        budget.spend("block", BLOCK)
    assert str(refusal.value) == (
        "'block' (27.7 MiB) does not fit beside 'filter' (44.8 MiB), 'libraries' (12.4 MiB); "
        "most goes to 'filter'. Raise the memory budget to at least 90 MB "
        "(memory: needs 84.9 MiB, allowed 84.9 MiB)"
    )
    assert refusal.value.resource == "memory"
    assert Budget.of("90 MB").left_bytes > LIBRARIES + BLOCK + FILTER


def test_a_single_line_that_does_not_fit_has_no_others_to_name() -> None:
    """With nothing else planned the refusal names the line alone."""
    with pytest.raises(DoesNotFit, match=r"^'block' \(27\.7 MiB\) does not fit\. Raise"):
        Budget(BLOCK - 1).spend("block", BLOCK)


def test_a_budget_may_be_spent_to_the_last_byte() -> None:
    """What is allowed is allowed: a line of exactly what is left fits."""
    assert Budget(BLOCK).spend("block", BLOCK).left_bytes == 0


def test_a_budget_that_overspends_cannot_be_built() -> None:
    """Every budget that exists fits, however it was made."""
    with pytest.raises(DoesNotFit):
        Budget(BLOCK, (Spending("filter", FILTER),))


@pytest.mark.parametrize("size", ["2 gigs", 0, "-1 GB", ""])
def test_a_size_that_is_none_is_an_input_error(size: int | str) -> None:
    """A size that cannot be read is the caller's to mend."""
    with pytest.raises(InputError):
        Budget.of(size)


def test_nothing_is_no_budget_and_no_line_is_negative() -> None:
    """A budget holds at least one byte, a line at least none."""
    with pytest.raises(InputError):
        Budget(0)
    with pytest.raises(InputError):
        Budget(BLOCK).spend("block", -1)


def test_a_size_is_read_in_people_s_units() -> None:
    """`of` takes bytes, and text with a unit."""
    assert Budget.of("2 GB") == Budget(2_000_000_000)
    assert Budget.of(BLOCK) == Budget(BLOCK)


def test_without_a_size_four_fifths_of_what_there_is_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is 80 % of what the binding limit leaves plus what the tree holds, and says so."""
    # Another job in the same cgroup holds memory too: what this tree holds is a part of what is used.
    limit = Limit("cgroup v2", allowed_bytes=1009 << 20, used_bytes=211 << 20, where="/sys/memory.max")
    monkeypatch.setattr(limits, "binding_limit", lambda: limit)
    monkeypatch.setattr(usage, "read_usage", lambda: Usage(103 << 20, 1, "PSS"))
    budget = Budget.of(None)
    assert budget.allowed_bytes == (1009 - 211 + 103) * 2**20 * 4 // 5
    assert budget.origin == "80% of 901 MiB (cgroup v2: /sys/memory.max)"
    assert str(budget).splitlines()[0] == f"memory budget  721 MiB  ({budget.origin})"


def test_the_default_holds_on_this_machine() -> None:
    """Whatever machine this is, it allows something without being told."""
    assert Budget.of(None).allowed_bytes > 0


def test_the_table_has_a_line_for_each_spending_and_what_is_left() -> None:
    """People see every line in order, aligned, and the rest."""
    budget = Budget(100_000_007).spend("libraries", LIBRARIES).spend("one block of signals", BLOCK)
    assert str(budget).splitlines() == [
        "memory budget           95.4 MiB",
        "  libraries             12.4 MiB",
        "  one block of signals  27.7 MiB",
        "  left                  55.3 MiB",
    ]
