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
"""Safetensors files read without torch: headers are checked before anything is allocated, tensors are streamed."""

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.report import FileEntry
from hf_unlearn.cards.tensor_types import DATA_TYPES, item_size


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_model.safetensors"
CONFIG_NAME = "config.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"

# What is held of a tensor at one time
CHUNK_BYTES = 4 * 2**20
# The format itself allows 100 MB; parsed, a header takes ten times its size, and no real one comes near this limit
MAX_HEADER_BYTES = 8 * 2**20
MAX_JSON_BYTES = 32 * 2**20
MAX_NAME_LENGTH = 512

# As the Hub's cache links the files of a snapshot; any other link may lead anywhere
_HUB_LINK = re.compile(r"(\.\./)+blobs/[0-9a-f]{40,64}")


class ModelFileError(ValueError):
    """
    What is wrong with a file, as one sentence that can become a [`~hf_unlearn.cards.findings.Finding`]. It repeats
    nothing that stands in the file: not even the name of a tensor, which may be a text.

    Parameters:
        rule (`str`): name of the rule.
        file (`str`): the file's name, without the folder.
        message (`str`): what is wrong and what to do.
    """

    def __init__(self, rule: str, file: str, message: str):
        super().__init__(f"{file} {message}")
        self.finding = Finding(rule, file, f"{file} {message}")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, as the header describes it; `offset` counts from the start of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass
class TensorFile:
    """One safetensors file: its tensors in the order of their bytes."""

    name: str
    size: int
    header: bytes
    metadata: dict[str, str] | None
    tensors: list[TensorEntry]
    descriptor: int = field(repr=False)
    # How much of the file has gone into the hash
    hashed: int = 0
    digest: Any = field(default_factory=hashlib.sha256, repr=False)


class ModelTensors:
    """
    The tensors of a model or an adapter, in the order in which they lie in the files. Made by [`open_model`]; a
    context manager, because it holds the files open: what was checked is what is read.

    Attributes:
        kind (`str`): `"model"` or `"adapter"`.
        files (`dict[str, TensorFile]`): the files, in the order of their names.
        tensors (`dict[str, TensorEntry]`): the tensors of all files.
        config (`dict`): `config.json` of a model or `adapter_config.json` of an adapter; empty where there is none.
        index (`bytes`, *optional*): the index of a sharded model, as it was read.
        bytes_read (`int`): how much of the safetensors files was read so far.
    """

    def __init__(self, descriptor: int, hub_links: bool):
        self._folder, self._hub_links = descriptor, hub_links
        self.kind: Literal["model", "adapter"] = "model"
        self.files: dict[str, TensorFile] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self.config: dict[str, Any] = {}
        self.index: bytes | None = None
        self.bytes_read = 0

    def __enter__(self) -> "ModelTensors":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self.files.values():
            os.close(file.descriptor)
        self.files = {}
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    @property
    def size(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.size for file in self.files.values())

    @property
    def parameters(self) -> int:
        """Elements of all stored tensors: tied weights that are stored once count once."""
        return sum(tensor.parameters for tensor in self.tensors.values())

    def chunks(self, name: str, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """The bytes of a tensor, `size` at a time; fewer in the last chunk."""
        for start in range(0, self.tensors[name].size, size):
            yield self.read(name, start, min(size, self.tensors[name].size - start))

    def read(self, name: str, start: int, size: int) -> bytes:
        """`size` bytes of a tensor from its byte `start` on."""
        tensor = self.tensors[name]
        return self._read(self.files[tensor.file], tensor.offset + start, size)

    def file_entries(self) -> list[FileEntry]:
        """
        Size and hash of every safetensors file. What was read in the order of the file is in the hash already; only
        the rest is read here.
        """
        for file in self.files.values():
            while file.hashed < file.size:
                self._read(file, file.hashed, min(CHUNK_BYTES, file.size - file.hashed))
        return [FileEntry(file.name, file.size, file.digest.hexdigest()) for file in self.files.values()]

    def format_findings(self) -> list[Finding]:
        """One finding for every file whose `__metadata__` is not exactly `{"format": "pt"}`."""
        return [
            Finding(
                "safetensors-metadata",
                file.name,
                f'the `__metadata__` of {file.name} is not exactly {{"format": "pt"}}: save the model again with '
                "`save_pretrained`",
            )
            for file in self.files.values()
            if file.metadata != {"format": "pt"}
        ]

    def read_small_file(self, name: str, limit: int = MAX_JSON_BYTES) -> bytes | None:
        """The bytes of a regular file of the folder, or `None` where there is none."""
        descriptor, size = self._open(name) or (-1, 0)
        if descriptor < 0:
            return None
        try:
            if size > limit:
                raise ModelFileError("file-size", name, f"is larger than {limit} bytes: it is not what its name says")
            return _read_exactly(descriptor, name, 0, size)
        finally:
            os.close(descriptor)

    def _read(self, file: TensorFile, offset: int, size: int) -> bytes:
        data = _read_exactly(file.descriptor, file.name, offset, size)
        self.bytes_read += size
        if offset <= file.hashed < offset + size:
            file.digest.update(memoryview(data)[file.hashed - offset :])
            file.hashed = offset + size
        return data

    def _open(self, name: str) -> tuple[int, int] | None:
        """Descriptor and size of a regular file that is no symbolic link; `None` where there is none."""
        # Not blocking: a pipe would wait for its writer
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            try:
                descriptor = os.open(name, flags, dir_fd=self._folder)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EMLINK) or not self._hub_links:
                    raise
                target = os.readlink(name, dir_fd=self._folder)
                if not _HUB_LINK.fullmatch(target):
                    raise
                descriptor = os.open(target, flags, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise ModelFileError("symlink", name, "is a symbolic link: put the file itself there") from error
            raise ModelFileError("unreadable", name, f"cannot be read ({os.strerror(error.errno)})") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise ModelFileError("not-a-file", name, "is not a regular file: remove it")
        return descriptor, status.st_size

    def _add_file(self, name: str) -> None:
        opened = self._open(name)
        if opened is None:
            raise ModelFileError("missing-file", name, "is missing: save the model again")
        descriptor, size = opened
        file = TensorFile(name, size, b"", None, [], descriptor)
        self.files[name] = file
        if size < 8:
            raise _broken(name, "is too short for a safetensors file")
        length = int.from_bytes(self._read(file, 0, 8), "little")
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(name, "names a header that is longer than the file, or than a header may be")
        file.header = self._read(file, 8, length)
        file.metadata, file.tensors = parse_header(file.header, name, size)
        for tensor in file.tensors:
            if tensor.name in self.tensors:
                raise ModelFileError("safetensors-index", name, "has a tensor that another shard has too")
            self.tensors[tensor.name] = tensor


def open_model(folder: str | os.PathLike, hub_links: bool = False) -> ModelTensors:
    """
    Open the safetensors files of a folder: `model.safetensors`, the shards that `model.safetensors.index.json` names
    (no others), or `adapter_model.safetensors`. Headers and index are read and checked here, no tensor is.

    Args:
        folder (`str` or `os.PathLike`):
            The folder of a model or an adapter.
        hub_links (`bool`, *optional*, defaults to `False`):
            Whether files may be links into `blobs/`, as in the snapshots of the Hub's cache. Any other link is
            refused in either case.

    Returns:
        [`ModelTensors`]: a context manager, which closes the files.

    Raises:
        [`ModelFileError`]: there is no model, or a file is not what it should be.

    Example:

    ```python
    >>> import tempfile
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from safetensors.numpy import save_file
    >>> from hf_unlearn.cards.tensor_files import open_model
    >>> from hf_unlearn.cards.tensor_types import to_float

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"weight": np.arange(6, dtype=np.float16).reshape(2, 3)}, Path(folder, "model.safetensors"))
    ...     with open_model(folder) as model:
    ...         entry = model.tensors["weight"]
    ...         values = [to_float(chunk, entry.dtype).tolist() for chunk in model.chunks("weight")]
    >>> entry.dtype, entry.shape, values
    ('F16', (2, 3), [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]])

    ```
    """
    return _opened(folder, hub_links, _fill)


def open_tensor_file(folder: str | os.PathLike, name: str) -> ModelTensors:
    """As [`open_model`], one safetensors file of a folder, whatever its name."""
    return _opened(folder, False, lambda model, _: model._add_file(name))


def read_small_file(folder: str | os.PathLike, name: str) -> bytes | None:
    """The bytes of a regular file of a folder, or `None` where there is none."""
    with _opened(folder, False, lambda model, _: None) as opened:
        return opened.read_small_file(name)


def _opened(folder: str | os.PathLike, hub_links: bool, fill: Callable[[ModelTensors, str], None]) -> ModelTensors:
    name = os.path.basename(os.path.abspath(folder))
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelFileError("no-model", name, "is not a folder that can be read") from error
    model = ModelTensors(descriptor, hub_links)
    try:
        fill(model, name)
    except BaseException:
        model.close()
        raise
    return model


def _fill(model: ModelTensors, folder: str) -> None:
    present = set(os.listdir(model._folder))
    found = [name for name in (WEIGHTS_NAME, INDEX_NAME, ADAPTER_NAME) if name in present]
    if len(found) > 1:
        raise ModelFileError("no-model", folder, f"has both {found[0]} and {found[1]}: leave the one that counts")
    if not found:
        pickled = any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in present)
        raise ModelFileError(
            "no-model",
            folder,
            "has weights in pickled files only: save the model again as safetensors"
            if pickled
            else f"is no model: it has neither {WEIGHTS_NAME} nor {INDEX_NAME} nor {ADAPTER_NAME}",
        )
    model.kind = "adapter" if found[0] == ADAPTER_NAME else "model"
    config_name = ADAPTER_CONFIG_NAME if model.kind == "adapter" else CONFIG_NAME
    content = model.read_small_file(config_name)
    if content is not None:
        model.config = parse_json(content, config_name)
    if found[0] != INDEX_NAME:
        model._add_file(found[0])
        return
    model.index = model.read_small_file(INDEX_NAME)
    weight_map = parse_index(model.index)
    for name in sorted(set(weight_map.values())):
        model._add_file(name)
    if {name: tensor.file for name, tensor in model.tensors.items()} != weight_map:
        raise ModelFileError("safetensors-index", INDEX_NAME, "does not agree with the shards: save the model again")


def parse_index(content: bytes) -> dict[str, str]:
    """Which file each tensor is in, from the bytes of `model.safetensors.index.json`."""
    weight_map = parse_json(content, INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError("safetensors-index", INDEX_NAME, "has no `weight_map`: save the model again")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name, re.ASCII):
            raise ModelFileError("safetensors-index", INDEX_NAME, "names a shard that is no .safetensors file here")
    return weight_map


def parse_header(header: bytes, file: str, size: int) -> tuple[dict[str, str] | None, list[TensorEntry]]:
    """
    Metadata and tensors of a safetensors header.

    Args:
        header (`bytes`): the JSON text after the first eight bytes of the file.
        file (`str`): the file's name, for messages.
        size (`int`): bytes of the whole file. The tensors have to fill what follows the header: no overlap, no gap,
            nothing after the last.

    Returns:
        The `__metadata__` (`None` where there is none) and the tensors in the order of their bytes.

    Raises:
        [`ModelFileError`]: something does not fit.
    """
    content = parse_json(header, file)
    metadata = content.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise _broken(file, "has a `__metadata__` that is no table of texts")
    start = 8 + len(header)
    tensors = sorted(
        (_entry(name, value, file, start) for name, value in content.items()), key=lambda t: (t.offset, t.size)
    )
    position = start
    for tensor in tensors:
        if tensor.offset != position:
            raise _broken(
                file, "has tensors that overlap" if tensor.offset < position else "has a gap between tensors"
            )
        position += tensor.size
    if position > size:
        raise _broken(file, "is shorter than its header says: it was cut, or not written to the end")
    if position < size:
        raise ModelFileError(
            "safetensors-trailing-bytes", file, "has bytes after the last tensor: save the model again"
        )
    return metadata, tensors


def _entry(name: str, value: Any, file: str, start: int) -> TensorEntry:
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise _broken(file, "has a tensor whose name is no printable text")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(file, "has a tensor without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DATA_TYPES:
        raise _broken(file, f"has a tensor of a data type that is not one of {', '.join(DATA_TYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise _broken(file, "has a tensor whose shape or offsets are no list of sizes")
    if len(offsets) != 2 or len(shape) > 64:
        raise _broken(file, "has a tensor without two offsets, or with more dimensions than there are")
    size = math.prod(shape) * item_size(dtype)
    if offsets[1] - offsets[0] != size:
        raise _broken(file, "has a tensor whose offsets do not fit its shape")
    return TensorEntry(name, file, dtype, tuple(shape), start + offsets[0], size)


def parse_json(content: bytes, file: str) -> dict[str, Any]:
    """The object in a JSON file; a key that stands twice is refused, because readers differ in which one they take."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise ModelFileError("json", file, "has a key twice: write the file again") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError("json", file, "is not valid JSON where it has to be: write the file again") from error
    if not isinstance(value, dict):
        raise ModelFileError("json", file, "is not a JSON object: write the file again")
    return value


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _DuplicateKeyError
    return content


def _broken(file: str, message: str) -> ModelFileError:
    return ModelFileError("safetensors-header", file, f"{message}: save the model again")


def _read_exactly(descriptor: int, name: str, offset: int, size: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # a read may give less than it was asked for, on some file systems
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise ModelFileError("unreadable", name, "became shorter while it was read")
        data += more
    return data
