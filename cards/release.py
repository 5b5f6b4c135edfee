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
"""A folder that is to be released, read once, and the rules that its files have to keep."""

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO

from hf_unlearn.cards.config_rules import (
    check_adapter_config,
    check_alone,
    check_config,
    check_generation_config,
    check_paths,
)
from hf_unlearn.cards.file_names import kind_of, leftover, unsafe_content
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.markdown_rules import check_markdown
from hf_unlearn.cards.metadata import check_metadata, parse_card
from hf_unlearn.cards.png import check_png
from hf_unlearn.cards.tensor_files import INDEX_NAME, ModelFileError, TensorEntry, parse_json
from hf_unlearn.cards.weight_rules import ADDED_WEIGHTS, check_header, check_shards, read_header


# A file up to this size is kept as bytes; safetensors files never are.
MAX_KEPT_FILE = 16 * 2**20
_MAX_KEPT = 256 * 2**20
_MAX_FILES = 10_000
_MAX_DEPTH = 8
_SNIFFED = 2**20
_CHUNK = 2**20
# As the Hub's cache links the files of a snapshot; any other link may lead anywhere.
_HUB_LINK = re.compile(r"(\.\./)+blobs/[0-9a-f]{40,64}")
_LINK = "it is a symbolic link: put the file itself there, or remove it."
_NO_FILE = "it is neither a file nor a folder: remove it."
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class ReleaseFile:
    """
    One file as it was when the folder was read: its bytes, or an open descriptor where it is large.

    Attributes:
        path (`str`): relative to the folder, with forward slashes.
        size (`int`): in bytes.
        content (`bytes`, *optional*): all of it; `None` for safetensors files and for what is larger than
            `MAX_KEPT_FILE`.
    """

    def __init__(self, path: str, size: int, content: bytes | None, descriptor: int = -1) -> None:
        self.path, self.size, self.content = path, size, content
        self.descriptor = descriptor
        self._sha256 = None if content is None else hashlib.sha256(content).hexdigest()

    @property
    def sha256(self) -> str:
        """
        Hash of the file. A large file is read for it at the first use, unless `sha256` was set by whoever read all of
        its bytes anyway.
        """
        if self._sha256 is None:
            with self.open() as file:
                self._sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._sha256

    @sha256.setter
    def sha256(self, digest: str) -> None:
        self._sha256 = digest

    def read(self, offset: int, size: int) -> bytes:
        """
        Bytes of the file, wherever others read in it.

        Raises:
            `ValueError`: The file became shorter.
        """
        if self.content is not None:
            return self.content[offset : offset + size]
        data = b""
        while len(data) < min(size, self.size - offset):
            more = os.pread(self.descriptor, min(size, self.size - offset) - len(data), offset + len(data))
            if not more:
                raise ValueError(f"{self.path} became shorter while it was read: try again when nothing writes to it.")
            data += more
        return data

    def open(self) -> BinaryIO:
        """The file as a binary stream with a position of its own, for an upload."""
        return io.BytesIO(self.content) if self.content is not None else io.BufferedReader(_Stream(self), _CHUNK)


class _Stream(io.RawIOBase):
    def __init__(self, file: ReleaseFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = max(
            0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        )
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:
        data = self._file.read(self._position, len(buffer)) if self._position < self._file.size else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class Release:
    """
    What was read of a folder; a context manager, which closes the large files. What is no regular file of the folder,
    hidden, or in `private/` is not in it, so it cannot be sent even where its finding is overridden.

    Attributes:
        files (`dict[str, ReleaseFile]`): by their paths, in order.
        findings (`list[Finding]`): what was left out, and why.
    """

    def __init__(self) -> None:
        self.files: dict[str, ReleaseFile] = {}
        self.findings: list[Finding] = []

    def __enter__(self) -> "Release":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the large files."""
        for file in self.files.values():
            if file.descriptor >= 0:
                os.close(file.descriptor)
                file.descriptor = -1

    def content(self, path: str) -> bytes | None:
        """The bytes of a small file; `None` where there is no such file, or it is large."""
        return self.files[path].content if path in self.files else None


def read_release(folder: str | os.PathLike, hub_links: bool = False) -> Release:
    """
    Read a folder once. Each entry is opened relative to its folder's descriptor without following links; what is
    changed, or put in the place of a file, afterwards does not change what was read.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.
        hub_links (`bool`, *optional*, defaults to `False`):
            Whether files may be links into `blobs/`, as in the snapshots of the Hub's cache: for a base, never for a
            release.

    Returns:
        [`Release`]: The files, and findings of the rules `symlink`, `hidden-file`, `not-regular`, `private`,
        `unreadable` and `file-name`.

    Raises:
        `ValueError`: The folder cannot be read, holds more than it can be expected to, or changed meanwhile.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_unlearn.cards.release import read_release

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text("{}")
    ...     Path(folder, "link").symlink_to("/etc/hostname")
    ...     with read_release(folder) as release:
    ...         Path(folder, "config.json").unlink()
    ...         list(release.files), release.content("config.json"), release.findings[0].rule
    (['config.json'], b'{}', 'symlink')

    ```
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(f"The release folder cannot be read ({os.strerror(error.errno)}): name a folder.") from None
    release = Release()
    try:
        _Reader(release, hub_links).read_folder(descriptor, "", 0)
    except BaseException as error:
        release.close()
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise ValueError(
                "The folder has more large files than this system lets be open at a time: raise `ulimit -n`."
            ) from None
        raise
    finally:
        os.close(descriptor)
    release.files = dict(sorted(release.files.items()))
    return release


class _Reader:
    """One walk through a folder."""

    def __init__(self, release: Release, hub_links: bool) -> None:
        self._release, self._hub_links = release, hub_links
        self._kept = self._count = 0

    def read_folder(self, descriptor: int, prefix: str, depth: int) -> None:
        for name in sorted(os.listdir(descriptor)):
            self._count += 1
            if self._count > _MAX_FILES:
                raise ValueError(f"The folder holds more than {_MAX_FILES:,} files: it is no folder of one model.")
            path = prefix + name
            if not name.isprintable() or "\\" in name:
                # As Python escapes it: the name itself may not be fit for a terminal
                self._find("file-name", ascii(path)[1:-1], "its name is not printable text: rename it.")
            elif path == "private":
                self._find("private", "private", "it holds what stays with the publisher: move it out of the folder.")
            elif name.startswith("."):
                self._find("hidden-file", path, "it is hidden: remove it.")
            else:
                self._read_entry(descriptor, name, path, depth)

    def _read_entry(self, parent: int, name: str, path: str, depth: int) -> None:
        try:
            # Looked at before it is opened: opening a device can have effects. What counts is the second look.
            mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
            target = os.readlink(name, dir_fd=parent) if stat.S_ISLNK(mode) and self._hub_links else ""
            if stat.S_ISLNK(mode) and not _HUB_LINK.fullmatch(target):
                return self._find("symlink", path, _LINK)
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or target):
                return self._find("not-regular", path, _NO_FILE)
            # Not blocking: a pipe that came in between would wait for its writer
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(target or name, flags, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                return self._find("symlink", path, _LINK)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return self._find(
                "unreadable", path, f"it cannot be opened ({os.strerror(error.errno)}): make it readable."
            )
        keep = False
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                if depth == _MAX_DEPTH:
                    raise ValueError(f"The folder is more than {_MAX_DEPTH} deep: it is no folder of one model.")
                self.read_folder(descriptor, f"{path}/", depth + 1)
            elif not stat.S_ISREG(status.st_mode):
                self._find("not-regular", path, _NO_FILE)
            else:
                keep = self._read_file(descriptor, path, status.st_size)
        finally:
            if not keep:
                os.close(descriptor)

    def _read_file(self, descriptor: int, path: str, size: int) -> bool:
        """Whether the file is kept open."""
        large = size > MAX_KEPT_FILE or self._kept + size > _MAX_KEPT or path.endswith(".safetensors")
        if large:
            self._release.files[path] = ReleaseFile(path, size, None, descriptor)
            return True
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            content = stream.read(size + 1)
        if len(content) != size:
            raise ValueError(f"{path} changed while it was read: try again when nothing writes to it.")
        self._kept += size
        self._release.files[path] = ReleaseFile(path, size, content)
        return False

    def _find(self, rule: str, path: str, message: str) -> None:
        self._release.findings.append(Finding(rule, path, message))


def check_files(release: Release, base: Release | None) -> list[Finding]:
    """
    The rules that need no report: which files there are, what kind of content they have, and that all that was not
    trained is the base's.

    Args:
        release ([`Release`]):
            The folder that is to be released.
        base ([`Release`], *optional*):
            The folder of the base model. Without it there is a finding `no-base`, as half of the rules compare.

    Returns:
        `list[Finding]`: What `read_release` found, then rules `not-allowed`, `pickle`, `not-text`, `too-large`,
        `json`, `missing-file`, `no-base`, `tokenizer-differs`, `custom-code`, `reversible`, those of safetensors
        (`safetensors-header`, `safetensors-trailing-bytes`, `safetensors-metadata`, `optimizer-tensor`,
        `safetensors-index`, `stale-shard`), and those of [`check_config`], [`check_png`], [`check_markdown`] and
        [`check_metadata`].
    """
    return list(dict.fromkeys([*release.findings, *_Checker(release, base).findings()]))


class _Checker:
    def __init__(self, release: Release, base: Release | None) -> None:
        self._files, self._base = release.files, base
        self._headers: dict[str, tuple[dict[str, str] | None, list[TensorEntry]]] = {}
        self._base_models: list[str] = []

    def findings(self) -> Iterator[Finding]:
        yield from self._check_whole()
        for path, file in self._files.items():
            if kind_of(path) == "weights":
                yield from self._check_weights(path, file)
        index = self._files.get(INDEX_NAME)
        yield from check_shards(index.content if index else None, self._headers)
        # The card first: the adapter is compared with what it names
        for path, file in sorted(self._files.items(), key=lambda item: kind_of(item[0]) != "card"):
            yield from self._check_file(path, file)
        if self._base is not None and self._has_model():
            for path in self._base.files:
                if path not in self._files and kind_of(path) == "tokenizer":
                    yield Finding("tokenizer-differs", path, "the base has it and the release has not: copy it.")
            if "generation_config.json" in self._base.files and "generation_config.json" not in self._files:
                message = "the base has it and the release has not: copy it."
                yield Finding("config-differs", "generation_config.json", message)

    def _has_model(self) -> bool:
        return any(kind_of(path) == "weights" and path not in ADDED_WEIGHTS for path in self._files)

    def _check_whole(self) -> Iterator[Finding]:
        for path in ("README.md", "unlearning_report.json", *(["config.json"] if self._has_model() else [])):
            if path not in self._files:
                yield Finding("missing-file", path, "it is missing: no release goes without it.")
        if self._base is None:
            message = "no base was given, so half of the rules have nothing to compare with: name the base."
            yield Finding("no-base", "the folder", message)
        reversible = [path for path in ADDED_WEIGHTS if path in self._files]
        if self._has_model() or not reversible:
            if not self._has_model():
                yield Finding(
                    "missing-file", "model.safetensors", "the folder has no weights: name the folder of a model."
                )
            return
        message = (
            "without this file the base is back, and all that it knew: merge it by `hf-unlearn release`, or allow a "
            "reversible release."
        )
        yield Finding("reversible", reversible[0], message)
        if b"reversible" not in ((self._files["README.md"].content or b"") if "README.md" in self._files else b""):
            yield Finding(
                "reversible-unsaid", "README.md", "the card does not say that the release is reversible: say so."
            )

    def _check_weights(self, path: str, file: ReleaseFile) -> Iterator[Finding]:
        try:
            self._headers[path] = metadata, tensors = read_header(file)
        except ModelFileError as error:
            yield error.finding
            return
        yield from check_header(path, metadata, tensors, metadata is None and self._base_has_no_metadata())

    def _base_has_no_metadata(self) -> bool:
        shards = [file for path, file in self._base.files.items() if kind_of(path) == "weights"] if self._base else []
        try:
            return any(read_header(file)[0] is None for file in shards)
        except ModelFileError:
            return False

    def _check_file(self, path: str, file: ReleaseFile) -> Iterator[Finding]:
        kind = kind_of(path)
        words = unsafe_content(file.content if file.content is not None else file.read(0, _SNIFFED))
        if words:
            yield Finding("pickle", path, f"its content is {words}: remove it.")
        theirs = self._base.files.get(path) if self._base else None
        # Of weights no hash here: it would read them whole once more
        compared = theirs is not None and kind in ("code", "licence", "tokenizer") and theirs.size == file.size
        same = compared and theirs.sha256 == file.sha256
        if kind == "other":
            known = leftover(path)
            yield Finding("not-allowed", path, f"no release holds {known or 'a file of this name'}: remove it.")
        elif kind == "code" and not same:
            yield Finding("custom-code", path, "it is code that the base does not have, or not this: remove it.")
        elif kind == "tokenizer" and self._base and not same:
            yield Finding("tokenizer-differs", path, "it is not the base's, byte for byte: copy the base's file.")
        if kind in ("other", "weights") or (same and kind in ("code", "licence")):
            return
        if file.content is None:
            if kind != "tokenizer":
                yield Finding(
                    "too-large", path, f"it is larger than {MAX_KEPT_FILE:,} bytes: it is not what its name says."
                )
        elif kind == "picture":
            yield from check_png(path, file.content)
        elif kind != "tokenizer" or path.endswith((".json", ".jinja")):
            yield from self._check_text(path, kind, file.content)

    def _check_text(self, path: str, kind: str, content: bytes) -> Iterator[Finding]:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if _CONTROL.search(text):
            yield Finding("not-text", path, "it is no text in UTF-8: write it again.")
            return
        if kind == "card":
            yield from check_metadata(path, text)
            body = text
            try:
                metadata, body = parse_card(text)
                named = metadata.get("base_model")
                self._base_models = named if isinstance(named, list) else [named] if isinstance(named, str) else []
            except ValueError:
                pass  # which check_metadata says
            # The line numbers are those of the file
            text = re.sub(r"[^\r\n]", "", text[: len(text) - len(body)]) + body
        if kind in ("card", "markdown"):
            yield from check_markdown(path, text, set(self._files))
        if path.endswith(".json"):
            try:
                yield from self._check_json(path, parse_json(content, path))
            except ModelFileError as error:
                yield error.finding

    def _check_json(self, path: str, value: dict) -> Iterator[Finding]:
        base = self._base.content(path) if self._base else None
        base_config = (self._base.content("config.json") if self._base else None) or b"{}"
        local = check_paths(path, value)
        if local and kind_of(path) == "config" or any(finding.rule == "json" for finding in local):
            yield from local
            return
        if path in ("config.json", "tokenizer_config.json") and "--" in str(value.get("auto_map", "")):
            message = "`auto_map` runs code of another repository, which no hash covers: copy that code, or remove it."
            yield Finding("custom-code", path, message)
        if path == "adapter_config.json":
            yield from check_adapter_config(path, value, self._base_models)
        elif path == "config.json" and base is not None:
            names = {tensor.name for _, tensors in self._headers.values() for tensor in tensors}
            yield from check_config(path, value, parse_json(base, path), names)
        elif path == "generation_config.json" and self._base is not None:
            theirs = parse_json(base, path) if base is not None else None
            yield from check_generation_config(path, value, theirs, parse_json(base_config, "config.json"))
        elif kind_of(path) == "config":
            yield from check_alone(path, value)
