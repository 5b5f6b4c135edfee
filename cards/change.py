# Copyright 2026 The hf-unlearn authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""How far one tensor moved, summed up piece by piece."""

import math
from collections.abc import Iterator

import numpy as np

from hf_unlearn.cards.tensor_types import DATA_TYPES, item_size, to_float


# Elements that are held in float64 at one time: small enough for the processor's cache
BLOCK = 2**16

# Beyond so many separate runs of changed rows, a list of them is longer than it is worth
MAX_ROW_RANGES = 2**16


class Change:
    """
    The sums over one tensor before and after: pieces come in the order of the file, numbers are added in float64.

    Args:
        before_dtype (`str`): data type before, as safetensors names it.
        after_dtype (`str`): data type after.
        shape (`tuple[int, ...]`): shape of both.

    Attributes:
        changed (`int`): elements whose value differs.
        squared_change (`float`): `‖Δ‖²`.
        squared_norm (`float`): `‖W‖²` before.
        row_ranges (`list[list[int]]`, *optional*): first and one past the last row of each run of rows whose bits
            differ, a row being one index of the first dimension; `None` where there are more than `MAX_ROW_RANGES`,
            or where the data type differs.
        has_nan, has_inf (`bool`): whether the tensor after holds such values.

    Example:

    ```python
    >>> import numpy as np
    >>> from hf_unlearn.cards.change import Change

    >>> change = Change("F32", "F32", (4, 2))
    >>> before = np.array([[3, 4], [0, 0], [0, 0], [0, 0]], np.float32)
    >>> after = before + np.array([[0, 0], [1, 0], [0, 2], [0, 0]], np.float32)
    >>> change.add(before.tobytes(), after.tobytes())
    >>> change.changed, change.max_abs, change.row_ranges
    (2, 2.0, [[1, 3]])
    >>> round(change.relative_norm**2, 6)
    0.2

    ```
    """

    def __init__(self, before_dtype: str, after_dtype: str, shape: tuple[int, ...]):
        self.before_dtype, self.after_dtype = before_dtype, after_dtype
        self.changed = 0
        self.squared_change = self.squared_norm = self._max_abs = 0.0
        self.has_nan = self.has_inf = False
        self.row_ranges: list[list[int]] | None = [] if before_dtype == after_dtype else None
        self._row = max(math.prod(shape[1:]), 1)
        self._position = 0

    @property
    def relative_norm(self) -> float | None:
        """`‖Δ‖ / ‖W‖`, 1 for a change from zeros; `None` where a value is not finite."""
        if not self._is_finite:
            return None
        if not self.squared_norm:
            return float(self.squared_change > 0)
        return math.sqrt(self.squared_change / self.squared_norm)

    @property
    def max_abs(self) -> float | None:
        """`max |Δ|`; `None` where a value is not finite."""
        return self._max_abs if self._is_finite else None

    @property
    def _is_finite(self) -> bool:
        return math.isfinite(self.squared_change) and math.isfinite(self.squared_norm)

    def keep(self, data: bytes) -> None:
        """The next piece, which is the same before and after."""
        self._position += len(data) // item_size(self.before_dtype)
        for bits in _blocks(data, self.before_dtype):
            with np.errstate(over="ignore", invalid="ignore"):
                values = to_float(bits, self.before_dtype).astype(np.float64, copy=False)
                square = float(values @ values)
            self.squared_norm += square
            if not math.isfinite(square):
                self._look_for_nan_and_inf(values)

    def add(self, before: bytes, after: bytes) -> None:
        """The next piece, before and after."""
        same_dtype = self.before_dtype == self.after_dtype
        pairs = zip(_blocks(before, self.before_dtype), _blocks(after, self.after_dtype), strict=True)
        for before_bits, after_bits in pairs:
            differs = None
            if same_dtype:
                unsigned = f"<u{item_size(self.before_dtype)}"
                differs = before_bits.view(unsigned) != after_bits.view(unsigned)
                self._note_rows(np.flatnonzero(differs))
            self.add_values(to_float(before_bits, self.before_dtype), to_float(after_bits, self.after_dtype), differs)

    def add_values(self, before: np.ndarray, after: np.ndarray, differs: np.ndarray | None = None) -> None:
        """
        The next piece as numbers, flat.

        Args:
            before (`np.ndarray`): values before.
            after (`np.ndarray`): values after.
            differs (`np.ndarray`, *optional*): where the bits differ: a NaN that stayed is then no change.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            before, after = before.astype(np.float64, copy=False), after.astype(np.float64, copy=False)
            delta = after - before
            changed = delta != 0
            if differs is not None:
                changed &= differs
            square, norm = float(delta @ delta), float(before @ before)
        self.changed += int(np.count_nonzero(changed))
        self.squared_change += square
        self.squared_norm += norm
        self._position += before.size
        if math.isfinite(square) and math.isfinite(norm):
            self._max_abs = max(self._max_abs, float(np.abs(delta).max(initial=0.0)))
        else:
            self._look_for_nan_and_inf(after)

    def _note_rows(self, positions: np.ndarray) -> None:
        if self.row_ranges is None or not positions.size:
            return
        rows = (positions + self._position) // self._row
        breaks = np.flatnonzero(np.diff(rows) > 1)
        firsts, lasts = rows[np.append(0, breaks + 1)], rows[np.append(breaks, rows.size - 1)]
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            if self.row_ranges and first <= self.row_ranges[-1][1]:
                self.row_ranges[-1][1] = last + 1
            else:
                self.row_ranges.append([first, last + 1])
        if len(self.row_ranges) > MAX_ROW_RANGES:
            self.row_ranges = None

    def _look_for_nan_and_inf(self, values: np.ndarray) -> None:
        self.has_nan |= bool(np.isnan(values).any())
        self.has_inf |= bool(np.isinf(values).any())


def _blocks(data: bytes, dtype: str) -> Iterator[np.ndarray]:
    bits = np.frombuffer(data, DATA_TYPES[dtype])
    for start in range(0, bits.size, BLOCK):
        yield bits[start : start + BLOCK]
