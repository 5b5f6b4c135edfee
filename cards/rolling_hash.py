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
"""
Hashes of all stretches of a text at once.

The hash of characters `c` is the sum of `c[i] * base**i` modulo 2**64. That of a stretch is a difference of two sums
over the text, times a power of the inverse of the base.
"""

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np


# Characters of the longest stretch
LONGEST = 4096
_BLOCK = 1 << 18

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


@cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    size = _BLOCK + LONGEST + 1
    both = []
    for base in (_BASE, _INVERSE):
        powers = np.full(size, base, dtype=np.uint64)
        powers[0] = 1
        # Modulo 2**64, as unsigned integers wrap
        both.append(np.cumprod(powers))
    return both[0], both[1]


class Block:
    """A part of a folded text, with the sums that give the hash of any stretch beginning in it in one step."""

    def __init__(self, characters: np.ndarray, first: int):
        self.first = first
        self.own = min(_BLOCK, len(characters) - first)
        part = characters[first : first + _BLOCK + LONGEST].astype(np.uint64)
        powers, self._inverses = _powers()
        self._sums = np.zeros(len(part) + 1, dtype=np.uint64)
        np.cumsum(part * powers[: len(part)], out=self._sums[1:])

    def hashes(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The hashes of stretches that begin in this block and have at most `LONGEST` characters."""
        starts, ends = starts - self.first, ends - self.first
        return (self._sums[ends] - self._sums[starts]) * self._inverses[starts]

    def windows(self, size: int) -> np.ndarray:
        """The hashes of all stretches of `size` characters that begin in this block."""
        count = max(min(self.own, len(self._sums) - size), 0)
        return (self._sums[size : size + count] - self._sums[:count]) * self._inverses[:count]


def blocks(characters: np.ndarray) -> Iterator[Block]:
    """The parts of a folded text, so that the sums of only one are in memory."""
    return (Block(characters, first) for first in range(0, len(characters), _BLOCK))


class HashSet:
    """Many hashes, and which of others are among them."""

    def __init__(self, hashes: Iterable[np.ndarray]):
        self._sorted = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
        # One slot in sixteen taken, and never more than 16 MB
        bits = min(max(int(len(self._sorted) * 16).bit_length(), 12), 24)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, dtype=bool)
        self._table[self._sorted >> self._shift] = True

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Indices of those that are here."""
        likely = np.flatnonzero(self._table[hashes >> self._shift])
        if not len(likely) or not len(self._sorted):
            return likely[:0]
        wanted = hashes[likely]
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return likely[self._sorted[places] == wanted]


def hash_of(text: str) -> int:
    """The hash of one text, as `Block.hashes` gives it for a stretch that spells it."""
    value = 0
    for character in reversed(text):
        value = (value * _BASE + ord(character)) & 0xFFFFFFFFFFFFFFFF
    return value
