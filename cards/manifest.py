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
"""The edit manifest: what turns the base into the new model, bit for bit, with the hashes of both."""

import hashlib
import json
import math
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hf_unlearn._version import __version__
from hf_unlearn.cards.diff import ModelDiff, TensorDiff, diff_models
from hf_unlearn.cards.report import FileEntry, Name, RelativePath, Sha256
from hf_unlearn.cards.tensor_files import (
    CONFIG_NAME,
    ModelTensors,
    TensorEntry,
    parse_json,
    read_small_file,
)
from hf_unlearn.cards.tensor_types import DATA_TYPES, item_size
from hf_unlearn.cards.validation import validated


SCHEMA_VERSION = 1
MANIFEST_NAME = "edit_manifest.json"
EDIT_NAME = "edit.safetensors"
SIGNATURE_NAME = f"{MANIFEST_NAME}.sig"

# Keys of config.json that the new model may have another value of: what the tensors that are stored depend on
CONFIG_KEYS = ("tie_word_embeddings",)

# What else a model consists of: taken from the base, byte for byte
COMPANIONS = (
    CONFIG_NAME, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "chat_template.jinja", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip


# A tokenizer of a large vocabulary takes half of it
MAX_COMPANION_BYTES = 64 * 2**20

# Runs of rows in one manifest, so that it stays a file that is read at once
MAX_RUNS = 100_000

_WEIGHT_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)
_SETTING = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,99}")


@dataclass
class TensorRecord:
    """A tensor of the base or of the new model."""

    dtype: Name
    shape: list[int]
    sha256: Sha256


@dataclass
class TensorEdit:
    """
    How a tensor of the new model is made: from the base tensor `start`, of which the rows in `rows` (first and one
    past the last of each run) are replaced by those in `edit.safetensors`; or, without `start`, from
    `edit.safetensors` alone.
    """

    start: str | None
    rows: list[list[int]]


@dataclass
class WeightFile:
    """A weight file of the new model: its tensors in the order of their bytes, and the `format` in its metadata."""

    path: RelativePath
    size: int
    sha256: Sha256
    metadata_format: Literal["pt"] | None
    tensors: list[str]


@dataclass
class EditManifest:
    """
    The content of `edit_manifest.json`.

    The edit replaces whole rows rather than storing a difference: a float difference does not add up to the same bits
    in every type, and an XOR takes as many bytes as the rows themselves while it cannot be checked or read alone.
    Where the changed rows are all rows, or too scattered to be listed, the tensor is stored whole.

    Parameters:
        schema_version (`int`): version of this schema.
        tool_version (`str`): version of hf-unlearn that made it.
        base_tensors, new_tensors (`dict[str, TensorRecord]`): all tensors of both models.
        base_files (`list[FileEntry]`): the files of the base: weights, and what else is copied.
        new_files (`list[WeightFile]`): the weight files of the new model.
        edits (`dict[str, TensorEdit]`): the tensors of the new model that are not those of the base.
        edit_file ([`FileEntry`], *optional*): `edit.safetensors`; `None` where nothing has to be stored.
        config (`dict`): keys of `config.json` with another value than in the base, out of `CONFIG_KEYS`.
        settings (`dict`): hyperparameters of the run, as in the report's `method.settings`: names, numbers, no text.
        data_commitment (`str`, *optional*): HMAC-SHA256 of the forget set under a salt that its owner keeps.
        versions (`dict[str, str]`): what it was made with.
    """

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    tool_version: Name
    base_tensors: dict[str, TensorRecord]
    new_tensors: dict[str, TensorRecord]
    base_files: list[FileEntry]
    new_files: list[WeightFile]
    edits: dict[str, TensorEdit]
    edit_file: FileEntry | None
    config: dict[Literal["tie_word_embeddings"], bool | None]
    settings: dict[Name, float | int | str | bool | None]
    data_commitment: Sha256 | None
    versions: dict[Name, Name]

    def to_json(self) -> str:
        return json.dumps(asdict(validated(self, EditManifest, "")), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> "EditManifest":
        """
        Reads the bytes of a manifest.

        Raises:
            `ValueError`: they do not fit the schema, in one sentence.
        """
        values = parse_json(content, MANIFEST_NAME)
        version = values.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:
            raise ValueError(
                f"{MANIFEST_NAME} has schema version {version}, and this hf-unlearn reads up to {SCHEMA_VERSION}: "
                "upgrade hf-unlearn."
            )
        if version != SCHEMA_VERSION or type(version) is not int:
            raise ValueError(f"{MANIFEST_NAME} has no schema version {SCHEMA_VERSION}: make it again.")
        try:
            manifest = validated(values, cls, "")
        except ValueError as error:
            # The field at fault may be named by a tensor, and a tensor by anything
            raise ValueError(f"{MANIFEST_NAME} does not fit its schema: make it again.") from error
        _check_consistent(manifest)
        return manifest


def build_manifest(
    base: ModelTensors,
    new: ModelTensors,
    out_folder: str | os.PathLike,
    *,
    settings: dict[str, float | int | bool | str | None] | None = None,
    data_commitment: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[EditManifest, ModelDiff]:
    """
    Writes `edit_manifest.json` and, where it takes one, `edit.safetensors` into a new folder, from which
    [`~hf_unlearn.cards.rebuild.apply_manifest`] makes the new model out of the base, bit for bit.

    The models are compared in one pass; of the tensors that changed, NEW's bytes are then read once more.

    Args:
        base ([`~hf_unlearn.cards.tensor_files.ModelTensors`]): the base model.
        new ([`~hf_unlearn.cards.tensor_files.ModelTensors`]): the new model, no adapter.
        out_folder (`str` or `os.PathLike`): a folder that does not exist yet.
        settings (`dict`, *optional*): hyperparameters to record: plain names and numbers.
        data_commitment (`str`, *optional*): HMAC-SHA256 of the forget set, 64 hexadecimal digits. It is made outside,
            with a salt that never comes here.
        progress (`Callable[[int], None]`, *optional*): called with the number of bytes read.

    Returns:
        The manifest, and the difference that it was made from.

    Raises:
        `ValueError`: a model cannot be rebuilt from a manifest, or `out_folder` exists.
    """
    if "adapter" in (base.kind, new.kind):
        raise ValueError("A manifest is made of two models, not of adapters: merge the adapter first.")
    for file in new.files.values():
        if file.header != make_header(file.tensors, file.metadata and "pt"):
            raise ValueError(
                f"{file.name} of NEW does not have the header that safetensors writes, with no metadata but "
                '{"format": "pt"}: save the model again with `save_pretrained`.'
            )
    with new_folder(out_folder) as folder:
        difference = diff_models(base, new, progress)
        edited = [
            tensor
            for tensor in difference.tensors
            if tensor.new is not None and (tensor.status != "identical" or tensor.start is not None)
        ]
        edits = {tensor.name: _edit_of(tensor, MAX_RUNS // len(edited)) for tensor in edited}
        manifest = EditManifest(
            tool_version=__version__,
            base_tensors={
                tensor.start or tensor.name: TensorRecord(**asdict(tensor.base))
                for tensor in difference.tensors
                if tensor.base is not None
            },
            new_tensors={
                tensor.name: TensorRecord(**asdict(tensor.new))
                for tensor in difference.tensors
                if tensor.new is not None
            },
            base_files=[*difference.base_files, *_companions(base)],
            new_files=[
                WeightFile(
                    entry.path,
                    entry.size,
                    entry.sha256,
                    None if new.files[entry.path].metadata is None else "pt",
                    [tensor.name for tensor in new.files[entry.path].tensors],
                )
                for entry in difference.new_files
            ],
            edits=edits,
            edit_file=_write_edit(new, edits, difference, folder),
            config=_config_changes(base, new),
            settings=settings or {},
            data_commitment=data_commitment,
            versions={"python": platform.python_version(), "numpy": np.__version__, "hf-unlearn": __version__},
        )
        content = manifest.to_json()
        # What is written is what will be read: a fault is found here, and not by the one who applies it
        EditManifest.from_json(content.encode())
        (folder / MANIFEST_NAME).write_text(content, encoding="utf-8", newline="\n")
    return manifest, difference


def make_header(tensors: Iterable[TensorEntry | tuple[str, str, Sequence[int]]], metadata_format: str | None) -> bytes:
    """
    The JSON header that safetensors writes.

    Args:
        tensors (`Iterable`): entries of a file in the order of their bytes, or their name, data type and shape.
        metadata_format (`str`, *optional*): the `format` in its `__metadata__`; `None` for no `__metadata__`.
    """
    content: dict[str, Any] = {"__metadata__": {"format": metadata_format}} if metadata_format else {}
    offset = 0
    for tensor in tensors:
        name, dtype, shape = (tensor.name, tensor.dtype, tensor.shape) if isinstance(tensor, TensorEntry) else tensor
        end = offset + math.prod(shape) * item_size(dtype)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)


def stored_shape(record: TensorRecord, edit: TensorEdit) -> list[int] | None:
    """Shape of what `edit.safetensors` holds of a tensor; `None` where it holds nothing."""
    if edit.start is None:
        return record.shape
    rows = sum(stop - first for first, stop in edit.rows)
    return [rows, *record.shape[1:]] if rows else None


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that gets its name when the block ends without an error, and else is removed."""
    path = Path(path).absolute()
    if os.path.lexists(path):
        raise ValueError(f"{path.name} exists already: name a new folder.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder that {path.name} is to lie in does not exist: make it.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _edit_of(tensor: TensorDiff, most_runs: int) -> TensorEdit:
    rows = None if tensor.change is None else tensor.change.row_ranges
    if rows is None or len(rows) > most_runs or not tensor.new.shape:
        return TensorEdit(None, [])
    row_size = math.prod(tensor.new.shape[1:]) * item_size(tensor.new.dtype)
    # A run of rows takes about so many bytes in the manifest
    cost = sum(stop - first for first, stop in rows) * row_size + 24 * len(rows)
    if cost >= tensor.new.shape[0] * row_size and rows:
        return TensorEdit(None, [])
    return TensorEdit(tensor.start or tensor.name, rows)


def _write_edit(
    new: ModelTensors, edits: dict[str, TensorEdit], difference: ModelDiff, folder: Path
) -> FileEntry | None:
    """Writes what is not in the base, and sees that NEW has not changed since it was compared."""
    records = {tensor.name: tensor.new for tensor in difference.tensors if tensor.new is not None}
    stored = {name: stored_shape(records[name], edit) for name, edit in edits.items()}
    stored = {name: shape for name, shape in stored.items() if shape is not None}
    if not stored:
        return None
    # Wide types first, as safetensors does, so that every tensor is aligned
    names = sorted(stored, key=lambda name: (-item_size(records[name].dtype), name))
    header = make_header(((name, records[name].dtype, stored[name]) for name in names), "pt")
    digest, size = hashlib.sha256(), 0
    with open(folder / EDIT_NAME, "wb") as file:

        def write(data: bytes | memoryview) -> None:
            nonlocal size
            file.write(data)
            digest.update(data)
            size += len(data)

        write(len(header).to_bytes(8, "little") + header)
        for name in names:
            record, edit = records[name], edits[name]
            row_size = math.prod(record.shape[1:]) * item_size(record.dtype)
            whole = new.tensors[name].size
            ranges = [(0, whole)] if edit.start is None else [(a * row_size, b * row_size) for a, b in edit.rows]
            check, position = hashlib.sha256(), 0
            for chunk in new.chunks(name):
                check.update(chunk)
                end = position + len(chunk)
                while ranges and ranges[0][0] < end:
                    first, stop = ranges[0]
                    write(memoryview(chunk)[max(first - position, 0) : stop - position])
                    if stop > end:
                        break
                    ranges.pop(0)
                position = end
            if check.hexdigest() != record.sha256:
                raise ValueError("NEW changed while the manifest was made: make it again.")
    return FileEntry(EDIT_NAME, size, digest.hexdigest())


def _companions(base: ModelTensors) -> list[FileEntry]:
    contents = {name: base.read_small_file(name, MAX_COMPANION_BYTES) for name in COMPANIONS}
    return [
        FileEntry(name, len(content), hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
        if content is not None
    ]


def _config_changes(base: ModelTensors, new: ModelTensors) -> dict[str, bool]:
    return {
        key: new.config[key]
        for key in CONFIG_KEYS
        if key in new.config and base.config and new.config[key] != base.config.get(key)
    }


def _check_consistent(manifest: EditManifest) -> None:
    """Everything that [`~hf_unlearn.cards.rebuild.apply_manifest`] relies on, before a file is opened or written."""
    for fault, holds in _conditions(manifest):
        if not holds:
            raise ValueError(f"{MANIFEST_NAME} {fault}: make it again.")


def _conditions(manifest: EditManifest) -> Iterator[tuple[str, bool]]:
    new, base, edits = manifest.new_tensors, manifest.base_tensors, manifest.edits
    yield (
        "has a tensor of a type or shape that there is not",
        all(
            record.dtype in DATA_TYPES
            and len(record.shape) <= 64
            and all(size >= 0 for size in record.shape)
            and math.prod(record.shape) < 2**60
            for record in (*new.values(), *base.values())
        ),
    )
    paths = [file.path for file in manifest.new_files]
    yield (
        "has weight files without names of their own",
        len(set(paths)) == len(paths) > 0 and all(map(_WEIGHT_NAME.fullmatch, paths)),
    )
    names = [name for file in manifest.new_files for name in file.tensors]
    yield "does not put every tensor into one file", sorted(names) == sorted(new)
    yield "has a tensor whose name is no name", all(name and name != "__metadata__" for name in new)
    for file in manifest.new_files:
        header = make_header(((name, new[name].dtype, new[name].shape) for name in file.tensors), file.metadata_format)
        size = sum(math.prod(new[name].shape) * item_size(new[name].dtype) for name in file.tensors)
        yield "has a file whose size is not that of its tensors", file.size == 8 + len(header) + size
    yield "edits a tensor that the new model does not have", set(edits) <= set(new)
    yield (
        "leaves a tensor as it is that is another one in the base",
        all(name in edits or base.get(name) == record for name, record in new.items()),
    )
    yield "has an edit that does not fit its tensor", all(_fits(edit, new[name], base) for name, edit in edits.items())
    # One head from the embeddings. More copies would let a small file fill a disk
    copies = sum(edit.start not in (None, name) for name, edit in edits.items())
    yield "copies more than one tensor of the base under another name", copies <= 1
    has_data = any(stored_shape(new[name], edit) is not None for name, edit in edits.items())
    entry = manifest.edit_file
    yield (
        f"does not name {EDIT_NAME} where it needs one, and only there",
        entry.path == EDIT_NAME if has_data and entry is not None else has_data is (entry is not None),
    )
    yield (
        "names a file of the base that is no part of a model",
        all(entry.path in COMPANIONS or _WEIGHT_NAME.fullmatch(entry.path) for entry in manifest.base_files),
    )
    yield "has a config that is not one of switches", all(type(value) is bool for value in manifest.config.values())
    yield (
        "has a setting that is no plain name",
        all(_SETTING.fullmatch(value) for value in manifest.settings.values() if isinstance(value, str)),
    )


def _fits(edit: TensorEdit, record: TensorRecord, base: dict[str, TensorRecord]) -> bool:
    if edit.start is None:
        return not edit.rows
    start = base.get(edit.start)
    if start is None or (start.dtype, start.shape) != (record.dtype, record.shape) or not record.shape:
        return False
    position = 0
    for run in edit.rows:
        if len(run) != 2 or not position <= run[0] < run[1] <= record.shape[0]:
            return False
        position = run[1]
    return True


def load_manifest(folder: str | os.PathLike) -> tuple[EditManifest, bytes]:
    """
    Reads `edit_manifest.json`.

    Args:
        folder (`str` or `os.PathLike`): the folder that [`build_manifest`] wrote.

    Returns:
        The manifest and the bytes that it was read from, which a signature has to be of.

    Raises:
        `ValueError`: there is none, or it does not fit the schema.
    """
    content = read_small_file(folder, MANIFEST_NAME)
    if content is None:
        raise ValueError(f"The folder has no {MANIFEST_NAME}: pass the one that `hf-unlearn diff --manifest` wrote.")
    return EditManifest.from_json(content), content
