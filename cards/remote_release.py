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
"""A revision on the Hub that is to be a release: small files whole, the headers of weights, and hashes."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.remote import GIT_ATTRIBUTES, HubError, RemoteFile, read_file, read_tree
from hf_unlearn.cards.tensor_files import MAX_HEADER_BYTES, ModelFileError, TensorEntry, parse_header
from hf_unlearn.cards.weight_rules import ADDED_WEIGHTS


# Larger ones are large files on the Hub, whose hash it lists
_MAX_SMALL = 16 * 2**20
# Enough for most headers, so that most take one request
_FIRST_BYTES = 100_000
_RETRIES = 2


def may_be_named(path: str) -> bool:
    """Whether a path is one of a release, which says nothing by its name."""
    return path == GIT_ATTRIBUTES or kind_of(path) != "other"


class RemoteRelease:
    """
    One commit, as it was read.

    Args:
        api ([`~huggingface_hub.HfApi`]): the client.
        repo_id (`str`): of a model.
        commit (`str`): the commit.
        allowed (`Collection[str]`): paths that a release does not hold, and that its publisher let through.

    Attributes:
        files (`dict[str, RemoteFile]`): those that a release may hold.
        others (`list[str]`): paths of all other files, which are not read.
        contents (`dict[str, bytes]`): of small files.
        headers (`dict[str, tuple]`): metadata and tensors of weight files.
        sha256 (`dict[str, str]`): path -> SHA-256 of what was read, or as the Hub lists it.
        findings (`list[Finding]`): what could not be read, or is not what the Hub lists.
    """

    def __init__(self, api: HfApi, repo_id: str, commit: str, allowed: Collection[str] = ()) -> None:
        self._api, self.repo_id, self.commit = api, repo_id, commit
        self._folder: Path | None = None
        tree = read_tree(api, repo_id, commit)
        self.files = {path: file for path, file in tree.items() if may_be_named(path) or path in allowed}
        self.others = [path for path in tree if path not in self.files]
        self.contents: dict[str, bytes] = {}
        self.headers: dict[str, tuple[dict[str, str] | None, list[TensorEntry]]] = {}
        self.sha256: dict[str, str] = {}
        self.findings: list[Finding] = []

    @property
    def weights(self) -> list[str]:
        """All weight files."""
        return [path for path in self.files if kind_of(path) == "weights"]

    @property
    def model_files(self) -> list[str]:
        """Weight files of a model, without adapters and edits."""
        return [path for path in self.weights if path not in ADDED_WEIGHTS]

    def read(self, download: bool, progress: Callable[[int], None]) -> None:
        """
        Reads small files whole and the headers of weights.

        Args:
            download (`bool`): whether to download large files as well, and to hash them.
            progress (`Callable[[int], None]`): told how many more files were read.
        """
        with tempfile.TemporaryDirectory() if download else nullcontext() as folder:
            self._folder = None if folder is None else Path(folder)
            self._read_all(progress)

    def _read_all(self, progress: Callable[[int], None]) -> None:
        for path, file in self.files.items():
            try:
                self._read(path, file)
            except HfHubHTTPError as error:
                # The tree lists it all the same, as it lists a pointer whose large file was deleted
                if error.response.status_code != 404 or isinstance(error, RepositoryNotFoundError):
                    raise
                self._find("verify-missing", path, "the Hub lists it but no longer has its bytes: push it again.")
            progress(1)

    def _read(self, path: str, file: RemoteFile) -> None:
        if file.sha256 is not None:
            self.sha256[path] = file.sha256
        is_small = file.size <= _MAX_SMALL
        if file.sha256 is None or (is_small and kind_of(path) not in ("weights", "tokenizer")):
            if not is_small:
                return self._find("verify-extra", path, f"it has {file.size:,} bytes: it is not what its name says.")
            content = read_file(self._api, self.repo_id, file, self.commit, _MAX_SMALL)
            self.contents[path] = content
            self.sha256[path] = hashlib.sha256(content).hexdigest()
        elif self._folder is not None:
            return self._download(path, file)
        if kind_of(path) == "weights":
            self._read_header(path, file.size, lambda offset, size: self._bytes(path, offset, size))

    def _bytes(self, path: str, offset: int, size: int) -> bytes:
        """Some bytes of a file, where it is."""
        if path in self.contents:
            return self.contents[path][offset : offset + size]
        url = hf_hub_url(self.repo_id, path, revision=self.commit, endpoint=self._api.endpoint)
        headers = {**build_hf_headers(token=self._api.token), "Range": f"bytes={offset}-{offset + size - 1}"}
        response = http_backoff("GET", url, headers=headers, max_retries=_RETRIES, timeout=30)
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise HubError("The Hub did not answer with the part of a file that was asked for: try again.")
        return response.content

    def _read_header(self, path: str, size: int, read: Callable[[int, int], bytes]) -> None:
        try:
            if size < 8:
                raise ModelFileError("safetensors-header", path, "is too short for a safetensors file")
            first = read(0, min(size, _FIRST_BYTES))
            length = int.from_bytes(first[:8], "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ModelFileError("safetensors-header", path, "names a header that is longer than one may be")
            header = first[8 : 8 + length]
            if len(header) < length:
                header += read(8 + len(header), length - len(header))
            self.headers[path] = parse_header(header, path, size)
        except ModelFileError as error:
            self._find("verify-weights", path, f"{str(error).rstrip('.')}.")

    def _download(self, path: str, file: RemoteFile) -> None:
        """The bytes themselves, one file at a time, so that the disk holds one of them at most."""
        repo_id, commit = self.repo_id, self.commit
        try:
            local = Path(self._api.hf_hub_download(repo_id, path, revision=commit, local_dir=self._folder))
        except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled):
            raise  # some of which are an OSError
        except OSError as error:
            if error.errno is not None:
                reason = os.strerror(error.errno)
                raise HubError(f"A download cannot be kept ({reason}): set TMPDIR to a folder with space.") from error
            return self._find("verify-hash", path, "what the Hub sends is not of the size that it lists.")
        with open(local, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != file.sha256:
                self._find("verify-hash", path, "what the Hub sends is not what it lists: tell the Hub's support.")
            self.sha256[path] = digest
            if kind_of(path) == "weights":

                def read(offset: int, size: int) -> bytes:
                    stream.seek(offset)
                    return stream.read(size)

                self._read_header(path, file.size, read)
        local.unlink()

    def _find(self, rule: str, path: str, message: str) -> None:
        self.findings.append(Finding(rule, path if may_be_named(path) else "a file that was let through", message))
