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
"""Base and edit manifest give the new model, bit for bit."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from hf_unlearn.cards.manifest import (
    COMPANIONS,
    EDIT_NAME,
    MAX_COMPANION_BYTES,
    EditManifest,
    TensorEdit,
    TensorRecord,
    WeightFile,
    load_manifest,
    make_header,
    new_folder,
    stored_shape,
)
from hf_unlearn.cards.signing import verify_manifest
from hf_unlearn.cards.tensor_files import (
    CHUNK_BYTES,
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    ModelTensors,
    open_tensor_file,
    parse_json,
)
from hf_unlearn.cards.tensor_types import item_size


def apply_manifest(
    base: ModelTensors,
    manifest_folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    allowed_signers: str | os.PathLike | None = None,
    identity: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """
    Makes the new model out of the base and the edit: weights with the same bits in the same files, the other files
    those of the base.

    All of the base is checked against the manifest's hashes before anything is written, and all that was written
    before the folder gets its name: `out` is whole, or not there.

    Args:
        base ([`~hf_unlearn.cards.tensor_files.ModelTensors`]): the base model. It may be sharded in another way than
            the one that the manifest was made from.
        manifest_folder (`str` or `os.PathLike`): the folder that [`~hf_unlearn.cards.manifest.build_manifest`] wrote.
        out (`str` or `os.PathLike`): a folder that does not exist yet.
        allowed_signers (`str` or `os.PathLike`, *optional*): who may have signed, as
            [`~hf_unlearn.cards.signing.verify_manifest`] takes it; the signature is then verified first.
        identity (`str`, *optional*): who has to have signed.
        progress (`Callable[[int], None]`, *optional*): called with the number of bytes of the base that were checked,
            then with those of the new model that were written.

    Returns:
        `str`: who signed, or `"integrity only, no author"`.

    Raises:
        `ValueError`: the base is another one, the signature is not valid, or something does not fit the manifest.
    """
    progress = progress or (lambda size: None)
    manifest, content = load_manifest(manifest_folder)
    author = verify_manifest(manifest_folder, content, allowed_signers, identity)
    has_edit = manifest.edit_file is not None
    with (
        open_tensor_file(manifest_folder, EDIT_NAME) if has_edit else nullcontext() as edit,
        new_folder(out) as folder,
    ):
        if edit is not None:
            _check_edit(edit, manifest)
        companions = _check_base(base, manifest, progress)
        for file in manifest.new_files:
            _write_weights(folder, file, manifest, base, edit, progress)
        if [file.path for file in manifest.new_files] != [WEIGHTS_NAME]:
            (folder / INDEX_NAME).write_text(_index(manifest), encoding="utf-8", newline="\n")
        for name, data in companions.items():
            if name == CONFIG_NAME and manifest.config:
                values = {**parse_json(data, CONFIG_NAME), **manifest.config}
                data = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
            (folder / name).write_bytes(data)
    return author


def _check_edit(edit: ModelTensors, manifest: EditManifest) -> None:
    expected = {
        name: (manifest.new_tensors[name].dtype, tuple(shape))
        for name, tensor in manifest.edits.items()
        if (shape := stored_shape(manifest.new_tensors[name], tensor)) is not None
    }
    if edit.file_entries() != [manifest.edit_file] or expected != {
        name: (tensor.dtype, tensor.shape) for name, tensor in edit.tensors.items()
    }:
        raise ValueError(f"{EDIT_NAME} is not the file that the manifest names: get both again.")


def _check_base(base: ModelTensors, manifest: EditManifest, progress: Callable[[int], None]) -> dict[str, bytes]:
    """Compares all of the base with the manifest; returns the files that are not weights, as they were read."""
    wrong = ValueError("BASE is not the model that the manifest was made from: pass that model, in that revision.")
    described = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in base.tensors.items()}
    if described != {name: (record.dtype, record.shape) for name, record in manifest.base_tensors.items()}:
        raise wrong
    for name in base.tensors:
        digest = hashlib.sha256()
        for chunk in base.chunks(name):
            digest.update(chunk)
            progress(len(chunk))
        if digest.hexdigest() != manifest.base_tensors[name].sha256:
            raise wrong
    companions = {}
    for entry in manifest.base_files:
        if entry.path in COMPANIONS:
            content = base.read_small_file(entry.path, MAX_COMPANION_BYTES)
            if content is None or hashlib.sha256(content).hexdigest() != entry.sha256:
                raise ValueError(f"{entry.path} of BASE is not the file that the manifest was made with: restore it.")
            companions[entry.path] = content
    return companions


def _write_weights(
    folder: Path,
    file: WeightFile,
    manifest: EditManifest,
    base: ModelTensors,
    edit: ModelTensors | None,
    progress: Callable[[int], None],
) -> None:
    records = manifest.new_tensors
    header = make_header(
        ((name, records[name].dtype, records[name].shape) for name in file.tensors), file.metadata_format
    )
    digest = hashlib.sha256()
    with open(folder / file.path, "xb") as output:
        start = len(header).to_bytes(8, "little") + header
        output.write(start)
        digest.update(start)
        for name in file.tensors:
            check = hashlib.sha256()
            for piece in _pieces(name, records[name], manifest.edits.get(name), base, edit):
                output.write(piece)
                digest.update(piece)
                check.update(piece)
                progress(len(piece))
            if check.hexdigest() != records[name].sha256:
                raise ValueError("BASE and edit do not give the new model: the manifest is not to be trusted.")
    if digest.hexdigest() != file.sha256:
        raise ValueError("BASE and edit do not give the new model's files: the manifest is not to be trusted.")


def _pieces(
    name: str, record: TensorRecord, tensor_edit: TensorEdit | None, base: ModelTensors, edit: ModelTensors | None
) -> Iterator[bytes]:
    if tensor_edit is None:
        yield from base.chunks(name)
        return
    if tensor_edit.start is None:
        yield from edit.chunks(name)
        return
    row_size = math.prod(record.shape[1:]) * item_size(record.dtype)
    position = stored = 0
    for first, stop in tensor_edit.rows:
        yield from _range(base, tensor_edit.start, position * row_size, first * row_size)
        yield from _range(edit, name, stored * row_size, (stored + stop - first) * row_size)
        position, stored = stop, stored + stop - first
    yield from _range(base, tensor_edit.start, position * row_size, record.shape[0] * row_size)


def _range(model: ModelTensors, name: str, first: int, stop: int) -> Iterator[bytes]:
    for start in range(first, stop, CHUNK_BYTES):
        yield model.read(name, start, min(CHUNK_BYTES, stop - start))


def _index(manifest: EditManifest) -> str:
    """`model.safetensors.index.json`, as transformers writes it."""
    records = manifest.new_tensors.values()
    parameters = sum(math.prod(record.shape) for record in records)
    size = sum(math.prod(record.shape) * item_size(record.dtype) for record in records)
    weight_map = {name: file.path for file in manifest.new_files for name in file.tensors}
    content = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": weight_map}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
