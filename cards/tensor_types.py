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
"""The data types of safetensors and their values, by NumPy alone."""

import numpy as np


# The type that the bits of a tensor are read as; those that NumPy lacks as unsigned integers of the same width
DATA_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "F8_E8M0": "u1",
    "I64": "<i8", "U64": "<u8", "I32": "<i4", "U32": "<u4", "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1",
    "BOOL": "u1",
}  # fmt: skip
# float32 does not hold all of their values
_WIDE = ("F64", "I64", "U64", "I32", "U32")


def item_size(dtype: str) -> int:
    """Bytes of one element."""
    return np.dtype(DATA_TYPES[dtype]).itemsize


def to_float(data: bytes | np.ndarray, dtype: str) -> np.ndarray:
    """
    The values of a tensor's bytes: float32, or float64 for the types whose values float32 does not hold.

    Args:
        data (`bytes` or `np.ndarray`): bytes as they lie in the file, or their view of type `DATA_TYPES[dtype]`.
        dtype (`str`): data type as safetensors names it, such as `"BF16"`.

    Returns:
        `np.ndarray`: the values, flat where `data` are bytes.

    Example:

    ```python
    >>> from hf_unlearn.cards.tensor_types import to_float
    >>> to_float(b"\\x80\\x3f", "BF16"), to_float(b"\\x38", "F8_E4M3")
    (array([1.], dtype=float32), array([1.], dtype=float32))

    ```
    """
    bits = np.frombuffer(data, DATA_TYPES[dtype]) if isinstance(data, bytes) else data
    if dtype == "BF16":  # the upper half of a float32
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype in _SMALL_FLOATS:
        return _SMALL_FLOATS[dtype][bits]
    return bits.astype(np.float64 if dtype in _WIDE else np.float32, copy=False)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """
    `values` (float32) as a tensor of type `dtype` would keep them, again as float32: for `"BF16"` rounded to the
    nearest, ties to even.
    """
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
        return np.where(np.isnan(values), np.float32(np.nan), rounded.astype(np.uint32).view(np.float32))
    raise ValueError(f"merging an adapter into {dtype} weights is not supported: convert the base to BF16 or F32")


def _small_floats() -> dict[str, np.ndarray]:
    """The value of each of the 256 codes of the types of eight bits."""
    codes = np.arange(256)

    def decode(mantissa_bits: int, bias: int) -> np.ndarray:
        exponent = (codes & 0x7F) >> mantissa_bits
        fraction = (codes & (2**mantissa_bits - 1)) / 2**mantissa_bits
        size = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
        return np.where(codes & 0x80, -size, size).astype(np.float32)

    tables = {
        "F8_E4M3": decode(3, 7),
        "F8_E5M2": decode(2, 15),
        "F8_E4M3FNUZ": decode(3, 8),
        "F8_E5M2FNUZ": decode(2, 16),
        "F8_E8M0": (2.0 ** np.where(codes < 0xFF, codes - 127.0, 0)).astype(np.float32),
    }
    tables["F8_E4M3"][[0x7F, 0xFF]] = np.nan
    tables["F8_E5M2"][[0x7C, 0xFC]] = np.inf, -np.inf
    tables["F8_E5M2"][[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
    # What would be the negative zero is the only NaN
    tables["F8_E4M3FNUZ"][0x80] = tables["F8_E5M2FNUZ"][0x80] = tables["F8_E8M0"][0xFF] = np.nan
    return tables


_SMALL_FLOATS = _small_floats()
