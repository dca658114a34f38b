from array import array
from typing import Any

from numpy.typing import NDArray

def gather(
    descriptors: array[int] | NDArray[Any],
    firsts: NDArray[Any],
    lengths: NDArray[Any],
    rows: NDArray[Any],
    ats: NDArray[Any],
    scale: NDArray[Any],
    offset: NDArray[Any],
    out: NDArray[Any],
    scratch: NDArray[Any],
    slots: NDArray[Any],
    slot_bytes: int,
    n_piece: int,
    stored: int,
    delivered: int,
    stored_bytes: int,
    delivered_bytes: int,
    n_values: int,
    n_times: int,
    n_scales: int,
    is_turned: bool,
    is_past_caches: bool,
) -> int: ...
def hint(descriptors: array[int] | NDArray[Any], firsts: NDArray[Any], n_bytes: NDArray[Any]) -> None: ...
