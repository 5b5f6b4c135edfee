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
"""Tensors of single rows on disk, for what does not change from epoch to epoch: activations and reference targets."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from ._version import __version__


logger = get_logger(__name__)

FORMAT = 1
_GB = 1e9
_ROW_OVERHEAD = 4096  # bytes: a file's header, and its last block
_STALE_SECONDS = 3600.0  # after which a file that is still being written belongs to a process that was killed


@dataclass(frozen=True)
class RowKey:
    """
    What identifies a row, made by the collator where the tokens are still in the host's memory.

    Attributes:
        tokens (`str`): hash of the token ids.
        labels (`str`): hash of the token ids and of which of them are labels.
        length (`int`): number of tokens.
        num_labels (`int`): number of tokens that are predicted and counted.
    """

    tokens: str
    labels: str
    length: int
    num_labels: int


def row_key(input_ids: list[int], labels: list[int]) -> RowKey:
    """
    The key of a row, from its content alone: shuffled, moved or renamed, a row keeps it; changed, it has another one.

    Example:

    ```python
    >>> from hf_unlearn.row_cache import row_key
    >>> row = row_key([5, 6, 7], [-100, 6, 7])
    >>> row.length, row.num_labels
    (3, 2)
    >>> row.tokens == row_key([5, 6, 7], [5, 6, 7]).tokens, row.labels == row_key([5, 6, 7], [5, 6, 7]).labels
    (True, False)

    ```
    """
    tokens = hashlib.sha256(torch.tensor(input_ids, dtype=torch.int64).numpy().tobytes())
    both = tokens.copy()
    both.update(torch.tensor(labels, dtype=torch.int64).numpy().tobytes())
    num_labels = sum(label != -100 for label in labels[1:])  # nothing predicts the first token
    return RowKey(tokens.hexdigest(), both.hexdigest(), len(input_ids), num_labels)


def describe_computation(model: PreTrainedModel, tensors: dict[str, Tensor], autocast: bool) -> dict[str, Any]:
    """
    All that a stored value depends on beside the row: weights (every bit of them), architecture, precision, versions.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model that computes; with PEFT, the model inside.
        tensors (`dict[str, torch.Tensor]`): its weights and buffers that take part, by name.
        autocast (`bool`): whether it runs under bf16 autocast.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = {**model.config.to_dict(), "_name_or_path": None, "use_cache": None}
    return {
        "format": FORMAT,
        "architecture": type(model).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "attention": model.config.get_text_config()._attn_implementation,
        "weights": digest.hexdigest(),
        "autocast": "bfloat16" if autocast else "none",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "device": model.get_input_embeddings().weight.device.type,
        "versions": {"hf-unlearn": __version__, **{name: version(name) for name in ("torch", "transformers", "peft")}},
    }


class RowCache:
    """
    A folder of rows that were computed in one and the same way.

    Each row is a safetensors file that appears under its name once it is whole: a kill leaves whole rows, and several
    processes may fill the folder at the same time. What was computed in another way lies in another sub-folder, named
    by the hash of its description, so nothing stale is ever found.

    Args:
        name (`str`): what messages call it.
        folder (`str`): folder of the cache, which may hold those of other runs.
        description (`dict[str, Any]`): what all values depend on, [`describe_computation`] among it. Written beside
            the rows; it holds no text and no path.

    Raises:
        `ValueError`: the folder cannot be written.
    """

    def __init__(self, name: str, folder: str, description: dict[str, Any]):
        text = json.dumps(description, sort_keys=True)
        self.name = name
        self.root = folder
        self.folder = os.path.join(folder, hashlib.sha256(text.encode()).hexdigest()[:32])
        self._has_room = True
        try:
            os.makedirs(self.folder, exist_ok=True)
            self._write("description.json", text.encode())
        except OSError as error:
            raise ValueError(f"The folder of {name} cannot be written ({error.strerror}): choose another.") from None

    def require_room(self, num_rows: int, num_bytes: int, limit_gb: float) -> None:
        """
        Refuses what would not fit, before anything is computed.

        Args:
            num_rows (`int`): rows that will be stored.
            num_bytes (`int`): size of their tensors.
            limit_gb (`float`): what the folder may hold, other runs' rows included, in 10^9 bytes.

        Raises:
            `ValueError`: with the numbers.
        """
        _remove_remains(self.root)
        needed = num_bytes + num_rows * _ROW_OVERHEAD
        own = _size_of(self.folder)
        others = _size_of(self.root) - own
        if others + needed > limit_gb * _GB:
            beside = f", beside {others / _GB:.3g} GB of other runs in its folder" if others else ""
            raise ValueError(
                f"{self.name} needs {needed / _GB:.3g} GB for {num_rows} rows{beside}, and cache_size_gb is "
                f"{limit_gb:g}: raise it, empty the folder, shorten rows (max_length), or do without {self.name}."
            )
        free = shutil.disk_usage(self.folder).free
        if needed - own > free:
            raise ValueError(
                f"{self.name} needs {(needed - own) / _GB:.3g} GB more for {num_rows} rows, and its disk has "
                f"{free / _GB:.3g} GB free: make room, choose another folder, or do without {self.name}."
            )

    def read(self, key: str, names: Iterable[str]) -> dict[str, Tensor] | None:
        """The tensors of a row, mapped from disk, or `None` where it has not been stored."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (FileNotFoundError, SafetensorError):
            return None  # not there, or damaged by something else than this program: computed and written again

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Stores the tensors of a row."""
        if not self._has_room:
            return
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        path = self._path(key)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._write(os.path.relpath(path, self.folder), content)
        except OSError as error:
            # It must not end a training: rows that are not stored are computed again
            self._has_room = False
            logger.warning(f"{self.name} could not be written ({error.strerror}): it is filled no further.")

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key[:2], f"{key}.safetensors")

    def _write(self, name: str, content: bytes) -> None:
        path = os.path.join(self.folder, name)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # the name must not reach the disk before the content
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            raise


def _files(folder: str) -> Iterable[str]:
    for path, _, names in os.walk(folder):
        for name in names:
            yield os.path.join(path, name)


def _size_of(folder: str) -> int:
    total = 0
    for path in _files(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may just have renamed it
            total += os.path.getsize(path)
    return total


def _remove_remains(folder: str) -> None:
    for path in _files(folder):
        with contextlib.suppress(FileNotFoundError):
            if path.endswith(".tmp") and time.time() - os.path.getmtime(path) > _STALE_SECONDS:
                os.remove(path)
