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
"""What differs between two models on disk: every tensor, a few megabytes at a time, every byte read once."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_unlearn.cards.adapter_diff import effective_changes
from hf_unlearn.cards.change import Change
from hf_unlearn.cards.report import FileEntry, Footprint, ModuleFootprint
from hf_unlearn.cards.tensor_files import CHUNK_BYTES, ModelTensors
from hf_unlearn.cards.tensor_types import item_size


# The head of a model and what it may have been tied to, in the architectures of transformers
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


@dataclass
class StoredTensor:
    """One side of a comparison: what the file says of a tensor, and the hash of its bytes (`None`: not read)."""

    dtype: str
    shape: list[int]
    sha256: str | None


@dataclass
class TensorDiff:
    """
    One tensor in both models.

    Parameters:
        name (`str`): its name in NEW, or in BASE where NEW has none.
        status (`str`): `identical` (the same bits), `changed`, `other_dtype` (compared as numbers), `other_shape`
            (not compared), `only_in_base`, `only_in_new`, or `not_compared` (a base tensor that an adapter leaves
            alone).
        base ([`StoredTensor`], *optional*): the tensor in BASE.
        new ([`StoredTensor`], *optional*): the tensor in NEW; `None` for the weight that an adapter changes, which
            stands in no file.
        parameters (`int`): number of elements.
        changed_parameters (`int`): elements whose value differs; `-0.0` equals `0.0`, though the bits differ.
        relative_norm (`float`, *optional*): `‖Δ‖ / ‖W‖`, summed in float64; `None` where nothing was compared, or a
            value is not finite.
        max_abs (`float`, *optional*): `max |Δ|`, likewise.
        has_nan, has_inf (`bool`): whether NEW holds such values (BASE, where the tensor is only there).
        start (`str`, *optional*): the tensor of BASE it was compared with, where that has another name: the
            embeddings, of a head that was tied to them.
        change ([`~hf_unlearn.cards.change.Change`], *optional*): the sums, and the rows that changed.
    """

    name: str
    status: Literal[
        "identical", "changed", "other_dtype", "other_shape", "only_in_base", "only_in_new", "not_compared"
    ]
    base: StoredTensor | None
    new: StoredTensor | None
    parameters: int
    changed_parameters: int = 0
    relative_norm: float | None = None
    max_abs: float | None = None
    has_nan: bool = False
    has_inf: bool = False
    start: str | None = None
    change: Change | None = field(default=None, repr=False)


@dataclass
class ModelDiff:
    """
    What [`diff_models`] found.

    Parameters:
        kind (`str`): `model`, or `adapter` for what an adapter makes of the weights of BASE.
        tensors (`list[TensorDiff]`): all tensors of both models.
        adapter_tensors (`list[TensorDiff]`): the tensors of an adapter's own file, where it was compared with a model.
        total_parameters (`int`): elements of all tensors of NEW (of BASE for an adapter), as stored: tied weights
            count once where they are stored once, as transformers does, and twice where they are stored twice.
        base_files, new_files (`list[FileEntry]`): the files that were read as a whole, with their hashes. Of the base
            of an adapter, only what the adapter changes is read, so that none stands here.
    """

    kind: Literal["model", "adapter"]
    tensors: list[TensorDiff]
    adapter_tensors: list[TensorDiff]
    total_parameters: int
    base_files: list[FileEntry]
    new_files: list[FileEntry]

    def with_status(self, *statuses: str) -> list[TensorDiff]:
        return [tensor for tensor in self.tensors if tensor.status in statuses]

    @property
    def moved(self) -> list[TensorDiff]:
        """Tensors with a value that changed, the one that moved furthest first."""
        tensors = [tensor for tensor in self.tensors if tensor.changed_parameters]
        return sorted(tensors, key=lambda t: math.inf if t.relative_norm is None else t.relative_norm, reverse=True)

    @property
    def not_finite(self) -> list[str]:
        """Names of the tensors of NEW that hold NaN or infinity."""
        tensors = [*self.tensors, *self.adapter_tensors]
        return [t.name for t in tensors if t.status != "only_in_base" and (t.has_nan or t.has_inf)]

    @property
    def is_same(self) -> bool:
        """Whether NEW has the tensors of BASE, bit for bit, and no other."""
        return all(tensor.status in ("identical", "not_compared") for tensor in self.tensors)

    def footprint(self) -> Footprint:
        """
        The part of the report that says how far the weights moved: the tensors with a changed value, in the order of
        the files. It holds the numbers that a run of `UnlearnTrainer` records of itself.

        Raises:
            `ValueError`: a model holds values that are not finite, so that there are no such numbers.
        """
        moved = [tensor for tensor in self.tensors if tensor.changed_parameters]
        if any(tensor.relative_norm is None or tensor.max_abs is None for tensor in moved):
            raise ValueError("The models hold NaN or infinite values where they differ: there is no footprint.")
        delta = math.fsum(tensor.change.squared_change for tensor in moved)
        norm = math.fsum(tensor.change.squared_norm for tensor in moved)
        return Footprint(
            changed_parameters=sum(tensor.changed_parameters for tensor in moved),
            total_parameters=self.total_parameters,
            relative_norm=math.sqrt(delta / norm) if norm else float(delta > 0),
            max_abs=max((tensor.max_abs for tensor in moved), default=0.0),
            modules=[
                ModuleFootprint(t.name, t.relative_norm, t.max_abs, t.changed_parameters, t.parameters) for t in moved
            ],
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        content = {
            "kind": self.kind,
            "same": self.is_same,
            "total_parameters": self.total_parameters,
            "changed_parameters": sum(tensor.changed_parameters for tensor in self.tensors),
            "not_finite": self.not_finite,
        }
        for name in ("tensors", "adapter_tensors"):
            content[name] = [_plain(tensor) for tensor in getattr(self, name)]
        for name in ("base_files", "new_files"):
            content[name] = [asdict(entry) for entry in getattr(self, name)]
        return content


def _plain(tensor: TensorDiff) -> dict[str, Any]:
    content = {name: value for name, value in vars(tensor).items() if name != "change"}
    content.update(
        base=None if tensor.base is None else asdict(tensor.base),
        new=None if tensor.new is None else asdict(tensor.new),
    )
    return content


def diff_models(
    base: ModelTensors | None, new: ModelTensors, progress: Callable[[int], None] | None = None
) -> ModelDiff:
    """
    Compare two models, or a model with what an adapter makes of it.

    Every byte is read once, and hashed for its tensor and for its file in the same pass, with three exceptions:
    tensors that lie in another order in BASE than in NEW (the hash of a file needs its order), the embeddings that a
    new head is compared with, and an adapter's own file, which is read twice. Never more than a few chunks of
    `CHUNK_BYTES` are held; of an adapter, the two factors of one module.

    Args:
        base ([`~hf_unlearn.cards.tensor_files.ModelTensors`], *optional*):
            The model before. `None` reads NEW alone: every tensor is then `only_in_new`, with its hash, and with
            whether its values are finite.
        new ([`~hf_unlearn.cards.tensor_files.ModelTensors`]):
            The model after, or a LoRA adapter: then the weights that merging it would leave, in the data type of
            BASE, are compared with those of BASE, `B A · scale` computed in blocks of rows.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of bytes that were read since the last call.

    Returns:
        [`ModelDiff`]

    Raises:
        `ValueError`: the models are of two architectures, the adapter is not supported, or a file broke.

    Example:

    ```python
    >>> import tempfile
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from safetensors.numpy import save_file
    >>> from hf_unlearn.cards.diff import diff_models
    >>> from hf_unlearn.cards.tensor_files import open_model

    >>> weight = np.array([[3, 4], [0, 0]], np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name, change in (("base", 0), ("new", 0.5)):
    ...         Path(folder, name).mkdir()
    ...         tensors = {"a": weight, "b": weight + np.float32(change) * np.eye(2, dtype=np.float32)}
    ...         save_file(tensors, Path(folder, name, "model.safetensors"))
    ...     with open_model(Path(folder, "base")) as base, open_model(Path(folder, "new")) as new:
    ...         difference = diff_models(base, new)
    >>> [(tensor.name, tensor.status, tensor.changed_parameters, tensor.max_abs) for tensor in difference.tensors]
    [('a', 'identical', 0, 0.0), ('b', 'changed', 2, 0.5)]
    >>> round(difference.footprint().relative_norm, 6) == round(0.5**0.5 / 5, 6)
    True

    ```
    """
    progress = progress or (lambda size: None)
    if base is not None:
        check_same_architecture(base, new)
    if base is not None and new.kind == "adapter" and base.kind == "model":
        return _diff_adapter(base, new, progress)
    tensors = []
    for base_name, new_name in _reading_order(base, new):
        if new_name is None:
            tensors.append(_read_alone(base, base_name, "only_in_base", progress))
        elif base_name is None:
            tensors.append(_read_alone(new, new_name, "only_in_new", progress))
        else:
            tensors.append(_compare(base, base_name, new, new_name, progress))
    return ModelDiff(
        kind="model",
        tensors=tensors,
        adapter_tensors=[],
        total_parameters=new.parameters,
        base_files=[] if base is None else base.file_entries(),
        new_files=new.file_entries(),
    )


def check_same_architecture(base: ModelTensors, new: ModelTensors) -> None:
    """
    Refuses two models that cannot be compared.

    Raises:
        `ValueError`: an adapter is compared with a model in the wrong order, or the `config.json` of two models name
            two architectures.
    """
    if base.kind == "adapter" and new.kind == "model":
        raise ValueError("BASE is an adapter and NEW is a model: swap them.")
    if base.kind != new.kind:
        return
    for key in ("architectures", "model_type", "peft_type"):
        values = [model.config.get(key) for model in (base, new)]
        if None not in values and values[0] != values[1]:
            file = "adapter_config.json" if base.kind == "adapter" else "config.json"
            raise ValueError(
                f"BASE and NEW are of two architectures (`{key}` differs in their {file}): compare a model with the "
                "one it was made from."
            )


def _reading_order(base: ModelTensors | None, new: ModelTensors) -> Iterator[tuple[str | None, str | None]]:
    """
    Pairs of tensors in the order of NEW's files. What is only in BASE comes before the tensors that follow it in its
    file, so that both files are read from front to back where they have the same order.
    """
    if base is None:
        yield from ((None, name) for name in new.tensors)
        return
    alone = {
        name: [tensor for tensor in file.tensors if tensor.name not in new.tensors]
        for name, file in base.files.items()
    }
    for name in new.tensors:
        start = name if name in base.tensors else _tied_start(base, new, name)
        if start is None:
            yield None, name
            continue
        before = alone[base.tensors[start].file]
        while start == name and before and before[0].offset < base.tensors[start].offset:
            yield before.pop(0).name, None
        yield start, name
    for tensors in alone.values():
        yield from ((tensor.name, None) for tensor in tensors)


def _tied_start(base: ModelTensors, new: ModelTensors, name: str) -> str | None:
    """The embeddings of BASE, for a head that BASE does not store because it is tied to them."""
    if name not in _HEADS or base.config.get("tie_word_embeddings") is False:
        return None
    head = new.tensors[name]
    candidates = [
        tensor.name
        for tensor in base.tensors.values()
        if tensor.name.endswith(_EMBEDDINGS) and (tensor.shape, tensor.dtype) == (head.shape, head.dtype)
    ]
    return candidates[0] if len(candidates) == 1 else None


def _read_alone(
    model: ModelTensors,
    name: str,
    status: Literal["only_in_base", "only_in_new"],
    progress: Callable[[int], None],
) -> TensorDiff:
    entry = model.tensors[name]
    digest, change = hashlib.sha256(), Change(entry.dtype, entry.dtype, entry.shape)
    for chunk in model.chunks(name):
        digest.update(chunk)
        change.keep(chunk)
        progress(len(chunk))
    stored = StoredTensor(entry.dtype, list(entry.shape), digest.hexdigest())
    sides = (stored, None) if status == "only_in_base" else (None, stored)
    return TensorDiff(name, status, *sides, entry.parameters, has_nan=change.has_nan, has_inf=change.has_inf)


def _compare(
    base: ModelTensors, base_name: str, new: ModelTensors, new_name: str, progress: Callable[[int], None]
) -> TensorDiff:
    before, after = base.tensors[base_name], new.tensors[new_name]
    start = base_name if base_name != new_name else None
    if before.shape != after.shape:
        first = _read_alone(base, base_name, "only_in_base", progress)
        result = _read_alone(new, new_name, "only_in_new", progress)
        result.status, result.base, result.start = "other_shape", first.base, start
        return result
    same_dtype = before.dtype == after.dtype
    change = Change(before.dtype, after.dtype, after.shape)
    base_digest = hashlib.sha256()
    new_digest = base_digest if same_dtype else hashlib.sha256()
    elements = CHUNK_BYTES // max(item_size(before.dtype), item_size(after.dtype))
    pairs = zip(
        base.chunks(base_name, elements * item_size(before.dtype)),
        new.chunks(new_name, elements * item_size(after.dtype)),
        strict=True,
    )
    for base_chunk, new_chunk in pairs:
        if same_dtype and base_chunk == new_chunk:
            change.keep(base_chunk)
        else:
            if new_digest is base_digest:  # one hash does for both until the first difference
                new_digest = base_digest.copy()
            change.add(base_chunk, new_chunk)
        base_digest.update(base_chunk)
        if new_digest is not base_digest:
            new_digest.update(new_chunk)
        progress(len(base_chunk) + len(new_chunk))
    is_identical = same_dtype and new_digest is base_digest
    return TensorDiff(
        name=new_name,
        status="identical" if is_identical else "changed" if same_dtype else "other_dtype",
        base=StoredTensor(before.dtype, list(before.shape), base_digest.hexdigest()),
        new=StoredTensor(after.dtype, list(after.shape), new_digest.hexdigest()),
        parameters=after.parameters,
        changed_parameters=change.changed,
        relative_norm=change.relative_norm,
        max_abs=change.max_abs,
        has_nan=change.has_nan,
        has_inf=change.has_inf,
        start=start,
        change=change,
    )


def _diff_adapter(base: ModelTensors, adapter: ModelTensors, progress: Callable[[int], None]) -> ModelDiff:
    own = [_read_alone(adapter, name, "only_in_new", lambda size: None) for name in adapter.tensors]
    changes = {name: (change, digest) for name, change, digest in effective_changes(base, adapter, progress)}
    tensors = []
    for name, entry in base.tensors.items():
        change, digest = changes.get(name, (None, None))
        result = TensorDiff(
            name, "not_compared", StoredTensor(entry.dtype, list(entry.shape), digest), None, entry.parameters
        )
        if change is not None:
            result.status = "changed" if change.changed else "identical"
            result.changed_parameters, result.change = change.changed, change
            result.relative_norm, result.max_abs = change.relative_norm, change.max_abs
            result.has_nan, result.has_inf = change.has_nan, change.has_inf
        tensors.append(result)
    return ModelDiff("adapter", tensors, own, base.parameters, [], adapter.file_entries())
