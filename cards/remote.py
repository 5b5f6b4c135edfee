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
"""What the commands that talk to the Hub share: who is asked, what a revision holds, and failures in one sentence."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, RepoFile
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # that of the transport, which differs between releases of the client
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token, validate_repo_id
from huggingface_hub.utils.sha import git_hash


# Written by the Hub itself when a repository is created; it says which files are large
GIT_ATTRIBUTES = ".gitattributes"

_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


class HubError(Exception):
    """What the Hub refused, or that it was not reached: one sentence with the next step."""


@dataclass(frozen=True)
class RemoteFile:
    """
    A file of a revision, as the Hub lists it.

    Attributes:
        path (`str`): in the repository.
        size (`int`): in bytes.
        oid (`str`): SHA-1 of the git blob: of a large file, that of its pointer.
        sha256 (`str`, *optional*): of the content of a large file; `None` for others.
    """

    path: str
    size: int
    oid: str
    sha256: str | None = None


def check_repo_id(repo_id: str) -> str:
    """
    The id itself, if it is `namespace/name`.

    Raises:
        `ValueError`: it is not, which is known without asking anybody.

    Example:

    ```python
    >>> from hf_unlearn.cards.remote import check_repo_id
    >>> check_repo_id("org/name")
    'org/name'
    >>> check_repo_id("a name")
    Traceback (most recent call last):
        ...
    ValueError: The repository has to be named as OWNER/NAME, with letters, digits, '-', '_' and '.' only.

    ```
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if not _NAME.fullmatch(repo_id):
        raise ValueError("The repository has to be named as OWNER/NAME, with letters, digits, '-', '_' and '.' only.")
    return repo_id


def connect(token: str | None = None, *, required: bool = True) -> HfApi:
    """
    The client, with a token where there is one. Nothing is sent.

    Args:
        token (`str`, *optional*): defaults to that of `HF_TOKEN` or of `hf auth login`.
        required (`bool`, *optional*, defaults to `True`): whether there has to be one.

    Raises:
        `ValueError`: there is none.
    """
    token = token or get_token()
    if token is None and required:
        raise ValueError("There is no token for the Hub: run `hf auth login`, or set HF_TOKEN.")
    return HfApi(token=token or False, library_name="hf-unlearn")


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """
    Turns what the client raises into a [`HubError`] of one sentence. Server messages are not repeated: they may hold
    addresses and names of files.
    """
    try:
        yield
    # A download that breaks off is a LocalEntryNotFoundError
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubError(explain(error, repo_id)) from error


def explain(error: Exception, repo_id: str) -> str:
    """One sentence on what the client raised, with the next step."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return explain(error.__cause__, repo_id)  # of a download: "not in the cache" is what came of it
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated: ask for access on its page, and use a token that has it."
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is not on the Hub, or this token cannot see it: check the name, or `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no such revision: `hf-unlearn audit {repo_id}` lists its branches and tags."
    if isinstance(error, OfflineModeIsEnabled):
        return "The Hub is switched off by HF_HUB_OFFLINE: unset it."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "The Hub does not know this token: run `hf auth login`, or set HF_TOKEN."
        if status == 403:
            return f"This token may not do that in {repo_id}: use one with write access, or another repository."
        if status == 429:
            return "The Hub asks to be called less often (429): try again in some minutes."
        if status >= 500:
            return f"The Hub failed ({status}): try again, which is safe."
        return f"The Hub refused the request ({status}): set HF_DEBUG=1 to see what it says."
    return "The Hub cannot be reached: check the network and HF_ENDPOINT, and try again, which is safe."


def read_tree(api: HfApi, repo_id: str, revision: str) -> dict[str, RemoteFile]:
    """
    All files of a revision, by their path, as the Hub lists them: nothing is downloaded.

    Args:
        api ([`~huggingface_hub.HfApi`]): the client.
        repo_id (`str`): of a model.
        revision (`str`): branch, tag, `refs/pr/N` or commit.

    Returns:
        `dict[str, RemoteFile]`
    """
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {
        entry.path: RemoteFile(
            entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs is not None else None
        )
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def read_file(api: HfApi, repo_id: str, file: RemoteFile, revision: str, limit: int = 16 * 2**20) -> bytes:
    """
    The content of a small file, which is what the Hub lists: its hash is compared. Nothing is left in the cache.

    Args:
        api ([`~huggingface_hub.HfApi`]): the client.
        repo_id (`str`): of a model.
        file ([`RemoteFile`]): as [`read_tree`] gave it for this revision.
        revision (`str`): the commit.
        limit (`int`, *optional*, defaults to 16 MiB): larger files are refused.

    Raises:
        [`HubError`]: the file is larger, or what arrived is not what is listed.
    """
    if file.size > limit:
        raise HubError(f"A file in {repo_id} that should be small has {file.size:,} bytes: remove it there.")
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = api.hf_hub_download(repo_id, file.path, revision=revision, cache_dir=folder)
            content = Path(path).read_bytes()
    except OSError as error:
        if error.errno is None:  # one of the client's own
            raise
        reason = os.strerror(error.errno)
        raise HubError(f"A temporary file cannot be written ({reason}): make room, or set TMPDIR.") from error
    if not is_content(content, file):
        raise HubError(f"A file of {repo_id} did not arrive as the Hub lists it: try again.")
    return content


def is_content(content: bytes, file: RemoteFile) -> bool:
    """Whether a file of the Hub holds exactly this."""
    if file.sha256 is not None:
        return hashlib.sha256(content).hexdigest() == file.sha256
    return git_hash(content) == file.oid
