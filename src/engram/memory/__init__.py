"""What a job holds, what bounds it, and what it plans to hold.

``usage`` measures the process tree, ``limits`` reads what binds here, ``budget`` keeps the
lines of a plan. Bytes throughout; page cache never counts.
"""

from engram.memory.budget import Budget, Spending
from engram.memory.limits import (
    Limit,
    MemoryCgroup,
    binding_limit,
    disk_limit,
    find_memory_cgroup,
    memory_limits,
    shm_limit,
)
from engram.memory.usage import PeakWatch, Usage, bound_usage, read_usage, watch_peak

__all__ = [
    "Budget",
    "Limit",
    "MemoryCgroup",
    "PeakWatch",
    "Spending",
    "Usage",
    "binding_limit",
    "bound_usage",
    "disk_limit",
    "find_memory_cgroup",
    "memory_limits",
    "read_usage",
    "shm_limit",
    "watch_peak",
]
