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
"""The rules of safetensors files that need no tensor to be read."""

import re
from typing import TYPE_CHECKING

from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.tensor_files import (
    ADAPTER_NAME,
    INDEX_NAME,
    MAX_HEADER_BYTES,
    WEIGHTS_NAME,
    ModelFileError,
    TensorEntry,
    parse_header,
    parse_index,
    parse_json,
)


if TYPE_CHECKING:
    from hf_unlearn.cards.release import ReleaseFile

# What is added to the weights of the base, and is no model by itself.
ADDED_WEIGHTS = (ADAPTER_NAME, "edit.safetensors")
_OPTIMIZER = re.compile(
    r"(^|\.)(exp_avg(_sq)?|max_exp_avg_sq|momentum_buffer|optimizer|optim|master_params?|fp32_params?)($|\.)"
)


def read_header(file: "ReleaseFile") -> tuple[dict[str, str] | None, list[TensorEntry]]:
    """
    Metadata and tensors of a safetensors file.

    Args:
        file ([`~hf_unlearn.cards.release.ReleaseFile`]):
            The file; only its header is read.

    Returns:
        As [`~hf_unlearn.cards.tensor_files.parse_header`].

    Raises:
        [`~hf_unlearn.cards.tensor_files.ModelFileError`]: It is no safetensors file, or has gaps or trailing bytes.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 8 or length > min(file.size - 8, MAX_HEADER_BYTES):
        message = "names a header that is longer than the file, or than a header may be: save the model again"
        raise ModelFileError("safetensors-header", file.path, message)
    return parse_header(file.read(8, length), file.path, file.size)


def check_header(
    path: str, metadata: dict[str, str] | None, tensors: list[TensorEntry], may_miss: bool
) -> list[Finding]:
    """
    Whether the header of a safetensors file says nothing but what it has to.

    Args:
        path (`str`):
            The file.
        metadata (`dict`, *optional*):
            Its `__metadata__`.
        tensors (`list[TensorEntry]`):
            Its tensors.
        may_miss (`bool`):
            Whether the base has no `__metadata__` either.

    Returns:
        `list[Finding]`: Rules `safetensors-metadata` and `optimizer-tensor`.
    """
    findings = []
    if metadata != {"format": "pt"} and not (metadata is None and may_miss):
        message = 'its `__metadata__` is not exactly {"format": "pt"}: save the model again with `save_pretrained`.'
        findings.append(Finding("safetensors-metadata", path, message))
    if any(_OPTIMIZER.search(tensor.name) for tensor in tensors):
        message = "it has tensors of an optimizer, in which the training data can show: save the model alone."
        findings.append(Finding("optimizer-tensor", path, message))
    return findings


def check_shards(
    index: bytes | None, headers: dict[str, tuple[dict[str, str] | None, list[TensorEntry]]]
) -> list[Finding]:
    """
    Whether index and shards agree, and whether there are weights that no index names.

    Args:
        index (`bytes`, *optional*):
            Content of `model.safetensors.index.json`.
        headers (`dict[str, tuple]`):
            What [`read_header`] gave for each file.

    Returns:
        `list[Finding]`: Rules `safetensors-index` and `stale-shard`.
    """
    findings = []
    expected = {WEIGHTS_NAME, *ADDED_WEIGHTS}
    if index is not None:
        try:
            weight_map = parse_index(index)
            content = parse_json(index, INDEX_NAME)
        except ModelFileError as error:
            return [error.finding]
        shards = set(weight_map.values())
        expected = {*shards, *ADDED_WEIGHTS}
        held = {tensor.name: path for path in shards & set(headers) for tensor in headers[path][1]}
        counts = content.get("metadata", {})
        plain = isinstance(counts, dict) and all(
            key in ("total_size", "total_parameters") and type(count) in (int, float) for key, count in counts.items()
        )
        twice = sum(len(headers[path][1]) for path in shards & set(headers)) > len(held)
        if held != weight_map or twice or not plain or set(content) - {"metadata", "weight_map"}:
            message = "it does not agree with the shards, or holds more than an index: save the model again."
            findings.append(Finding("safetensors-index", INDEX_NAME, message))
    for path in headers:
        if path not in expected:
            message = "no index names it: remove it, or save into an empty folder."
            findings.append(Finding("stale-shard", path, message))
    return findings
