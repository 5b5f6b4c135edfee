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
"""What a LoRA adapter makes of the weights of its base, computed in blocks of rows."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hf_unlearn.cards.change import Change
from hf_unlearn.cards.tensor_files import CHUNK_BYTES, ModelTensors
from hf_unlearn.cards.tensor_types import item_size, round_to, to_float


_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")

# Initialisations that leave the base weights as they are. The others (PiSSA, OLoRA, CorDA, LoftQ) change them, so that
# the weights of BASE are not those that the adapter was trained on.
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


def effective_changes(
    base: ModelTensors, adapter: ModelTensors, progress: Callable[[int], None]
) -> Iterator[tuple[str, Change, str]]:
    """
    The weights of BASE that the adapter changes, as merging would leave them: `W + B A · scale` in the data type of
    `W`, with `scale = alpha / r`, or `alpha / √r` for a rank-stabilised adapter; and modules that were trained as a
    whole. Source: [LoRA](https://huggingface.co/papers/2106.09685), [rsLoRA](https://huggingface.co/papers/2312.03732).

    Args:
        base ([`~hf_unlearn.cards.tensor_files.ModelTensors`]): the model.
        adapter ([`~hf_unlearn.cards.tensor_files.ModelTensors`]): the adapter. Its two factors of one module are held
            in memory as a whole, the weight never is.
        progress (`Callable[[int], None]`): called with the number of bytes that were read of BASE.

    Returns:
        Name, change and hash of the bytes in BASE, for every weight that the adapter changes.

    Raises:
        `ValueError`: the adapter is of a kind that is not supported, or does not fit BASE.
    """
    config = adapter.config
    _check_supported(config)
    factors: dict[str, dict[str, str]] = {}
    for name in adapter.tensors:
        if not name.startswith(_PREFIX):
            raise ValueError("The adapter has a tensor that PEFT does not write: save it again with PEFT.")
        if found := _FACTOR.fullmatch(name.removeprefix(_PREFIX)):
            factors.setdefault(found[1], {})[found[2]] = name
        else:
            target = name.removeprefix(_PREFIX)
            _check_target(base, target, adapter.tensors[name].shape)
            yield _replaced(base, target, adapter, name, progress)
    for module, names in factors.items():
        if len(names) != 2:
            raise ValueError("The adapter has one factor of a module and not the other: save it again.")
        left, right, rounding = _factors(adapter, names, config.get("fan_in_fan_out") is True)
        rank = left.shape[1]
        alpha = _alpha(config, module)
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") is True else alpha / rank
        target = f"{module}.weight"
        _check_target(base, target, (left.shape[0], right.shape[1]))
        if "lora_embedding_" in names["A"]:  # PEFT rounds what it adds to embeddings to their type, not so elsewhere
            rounding = base.tensors[target].dtype
        yield _merged(base, target, left, right, np.float32(scale), rounding, progress)


def _check_supported(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError("The adapter is no LoRA by its adapter_config.json: other adapters are not supported.")
    if config.get("use_dora"):
        raise ValueError("The adapter is a DoRA, which is not supported: merge it, and compare the merged model.")
    for key in ("lora_bias", "use_qalora", "layer_replication", "target_parameters"):
        if config.get(key):
            raise ValueError(f"An adapter with `{key}` is not supported: merge it, and compare the merged model.")
    start = config.get("init_lora_weights")
    if not isinstance(start, (str, bool, type(None))) or start not in _INITIALISATIONS:
        raise ValueError(
            "The adapter's `init_lora_weights` changes the base weights, which is not supported: merge it, and "
            "compare the merged model."
        )


def _alpha(config: dict[str, Any], module: str) -> float:
    patterns = config.get("alpha_pattern") or {}
    # PEFT takes the keys for regular expressions. From a file that is not trusted only names are taken
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"[\w.]+", key, re.ASCII) for key in patterns):
        raise ValueError("The adapter's `alpha_pattern` is no table of module names: merge it, and compare the model.")
    key = next((key for key in patterns if module == key or module.endswith(f".{key}")), None)
    alpha = config.get("lora_alpha") if key is None else patterns[key]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e30:
        raise ValueError("The adapter's `lora_alpha` is no number: save the adapter again.")
    return float(alpha)


def _factors(adapter: ModelTensors, names: dict[str, str], is_transposed: bool) -> tuple[np.ndarray, np.ndarray, str]:
    """`left` and `right`, whose product has the shape of the weight, and the data type that the product is kept in."""
    a, b = adapter.tensors[names["A"]], adapter.tensors[names["B"]]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise ValueError("The adapter has factors that are no two matrices of one rank, which is not supported.")
    if a.dtype != b.dtype or a.dtype not in ("F32", "F16", "BF16"):
        raise ValueError("The adapter has factors that are not of one type F32, F16 or BF16: save it in one of them.")
    values = [to_float(b"".join(adapter.chunks(entry.name)), entry.dtype).reshape(entry.shape) for entry in (a, b)]
    if is_transposed or "lora_embedding_" in a.name:
        return np.ascontiguousarray(values[0].T), np.ascontiguousarray(values[1].T), a.dtype
    return values[1], values[0], a.dtype


def _check_target(base: ModelTensors, target: str, shape: tuple[int, ...]) -> None:
    if target not in base.tensors:
        raise ValueError("The adapter changes a weight that BASE does not have: pass the model that it belongs to.")
    if base.tensors[target].shape != shape:
        raise ValueError("The adapter changes a weight that has another shape in BASE: pass the model it belongs to.")


def _merged(
    base: ModelTensors,
    target: str,
    left: np.ndarray,
    right: np.ndarray,
    scale: np.float32,
    rounding: str,
    progress: Callable[[int], None],
) -> tuple[str, Change, str]:
    entry = base.tensors[target]
    change, digest = Change(entry.dtype, entry.dtype, entry.shape), hashlib.sha256()
    row_size = max(right.shape[1] * item_size(entry.dtype), 1)
    rows = max(CHUNK_BYTES // row_size, 1)
    for block, chunk in enumerate(base.chunks(target, rows * row_size)):
        digest.update(chunk)
        before = to_float(chunk, entry.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            delta = round_to((left[block * rows : (block + 1) * rows] @ right).ravel() * scale, rounding)
            change.add_values(before, round_to(before + delta, entry.dtype))
        progress(len(chunk))
    return target, change, digest.hexdigest()


def _replaced(
    base: ModelTensors, target: str, adapter: ModelTensors, name: str, progress: Callable[[int], None]
) -> tuple[str, Change, str]:
    before, after = base.tensors[target], adapter.tensors[name]
    change, digest = Change(before.dtype, after.dtype, before.shape), hashlib.sha256()
    elements = CHUNK_BYTES // max(item_size(before.dtype), item_size(after.dtype))
    chunks = (
        base.chunks(target, elements * item_size(before.dtype)),
        adapter.chunks(name, elements * item_size(after.dtype)),
    )
    for old, new in zip(*chunks, strict=True):
        digest.update(old)
        change.add(old, new)
        progress(len(old))
    return target, change, digest.hexdigest()
