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
"""What a repository on the Hub stores: its refs, commits and large files, and which of them hold weights."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_unlearn.cards.file_names import kind_of, leftover
from hf_unlearn.cards.remote import RemoteFile


MAIN = "refs/heads/main"
ORIGINAL, UNKNOWN, LEFTOVER = "history-original", "history-unknown", "history-leftover"

# Every format that a model of transformers was ever published in, and what several files are packed in
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|llamafile|h5|keras|msgpack|npz|onnx|onnx_data|tflite|nemo|mlmodel"
    r"|pdparams|ot|pkl|pickle|zip|tar|tgz|gz|bz2|xz|zst|7z|rar)"
)
_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*|tokenizer.*\.(bin|pkl|pickle)")
# Names that say no more than what a library calls such a file
_PLAIN_NAME = re.compile(
    r"(checkpoint-\d+/)?((pytorch_model|consolidated|adapter_model)([.-]\d+(-of-\d+)?)?\.(bin|pt|pth)|training_args\.bin"
    r"|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|trainer_state\.json"
    r"|(model|adapter_model)(-\d+-of-\d+)?\.safetensors|(tf_model|flax_model)\.(h5|msgpack)|model\.onnx)"
)

RefKind = Literal["branch", "tag", "pull request", "conversion"]


@dataclass(frozen=True)
class Ref:
    """
    A name under which the Hub serves a state of the repository, and all that came before it.

    Attributes:
        ref (`str`): in full, such as `refs/heads/main`, `refs/tags/v1` or `refs/pr/3`.
        kind (`str`): `"branch"`, `"tag"`, `"pull request"` or `"conversion"`.
        commits (`tuple[str, ...]`): from its tip to the first.
    """

    ref: str
    kind: RefKind
    commits: tuple[str, ...]

    @property
    def name(self) -> str:
        """As people call it: `main`, `v1`, `#3`."""
        return ("#" if self.kind == "pull request" else "") + self.ref.split("/", 2)[-1]


@dataclass(frozen=True)
class Commit:
    """
    One state of the repository.

    Attributes:
        oid (`str`): the commit.
        created (`str`): when, in ISO 8601.
        files (`dict[str, RemoteFile]`): by their paths, as the Hub lists them.
        listed (`frozenset[str]`): SHA-256 of the files that the unlearning report of this commit lists.
        base (`tuple[str, str | None]`, *optional*): id and revision of the base that this report names.
    """

    oid: str
    created: str
    files: dict[str, RemoteFile]
    listed: frozenset[str] = frozenset()
    base: tuple[str, str | None] | None = None


@dataclass(frozen=True)
class LargeFile:
    """A file in the storage of the repository, whether a ref reaches it or not."""

    sha256: str
    path: str
    size: int
    pushed: str


@dataclass
class History:
    """
    All that a repository serves.

    Attributes:
        repo_id (`str`): of the model.
        refs (`list[Ref]`): branches, tags, conversions and pull requests.
        commits (`dict[str, Commit]`): by their oid, each once.
        large (`dict[str, LargeFile]`, *optional*): the large files by their SHA-256; `None` where the token may not
            list them, so that those no ref reaches could not be looked for.
        gone (`set[str]`): SHA-256 of large files that commits still name and whose bytes are deleted: not served.
        digests (`dict[str, str]`): SHA-1 of a git blob -> SHA-256, of weight files that are not large ones.
    """

    repo_id: str
    refs: list[Ref]
    commits: dict[str, Commit]
    large: dict[str, LargeFile] | None = None
    gone: set[str] = field(default_factory=set)
    digests: dict[str, str] = field(default_factory=dict)

    def ref(self, name: str) -> Ref:
        """One ref, by its name in full."""
        return next(ref for ref in self.refs if ref.ref == name)

    @property
    def main(self) -> Commit:
        """The tip of main."""
        return self.commits[self.ref(MAIN).commits[0]]

    def sha256(self, file: RemoteFile) -> str | None:
        """Hash of a file's content, where it is known: of large files and of weights."""
        return file.sha256 or self.digests.get(file.oid)

    def hashes(self, commit: Commit) -> set[str]:
        """The hashes that are known of a commit's files."""
        return {digest for file in commit.files.values() if (digest := self.sha256(file)) is not None}

    def to_dict(self) -> dict[str, Any]:
        return {
            "repo_id": self.repo_id,
            "refs": [
                {"ref": ref.ref, "kind": ref.kind, "commit": ref.commits[0], "commits": len(ref.commits)}
                for ref in self.refs
            ],
            "commits": len(self.commits),
            "large_files": None if self.large is None else len(self.large),
        }


@dataclass(frozen=True)
class BaseFile:
    """
    A weight file of the base.

    Attributes:
        path (`str`): in the folder or repository of the base.
        size (`int`): in bytes.
        sha256 (`str`): of its content.
        oid (`str`, *optional*): SHA-1 of the git blob that it would be where it is no large file; `None` where only
            the Hub's listing of a large file is known.
    """

    path: str
    size: int
    sha256: str
    oid: str | None


@dataclass(frozen=True)
class ServedBy:
    """A ref that serves a file: at its tip (`behind` is 0), or only in a commit that many before it."""

    ref: str
    kind: RefKind
    name: str
    commit: str
    behind: int


@dataclass(frozen=True)
class Served:
    """
    A content that is still served, and should not be.

    Attributes:
        rule (`str`): `history-original`, a weight file of the base; `history-unknown`, weights that no report lists;
            `history-leftover`, what trainers leave behind.
        paths (`tuple[str, ...]`): under which names.
        size (`int`): in bytes.
        sha256 (`str`, *optional*): where it is known.
        oid (`str`, *optional*): SHA-1 of the git blob of a file that is not a large one; `None` for large ones.
        refs (`tuple[ServedBy, ...]`): the refs that reach it; none where it is an orphan of the storage.
        commits (`tuple[str, ...]`): the commits that hold it.
        since (`str`): when it appeared first, in ISO 8601.
    """

    rule: str
    paths: tuple[str, ...]
    size: int
    sha256: str | None
    oid: str | None
    refs: tuple[ServedBy, ...]
    commits: tuple[str, ...]
    since: str

    @property
    def is_large(self) -> bool:
        return self.oid is None

    @property
    def is_orphan(self) -> bool:
        """Whether only the storage holds it: who knows the address still gets it."""
        return not self.refs

    @property
    def names(self) -> tuple[str, ...]:
        """What may be said of its names, which can be any text."""
        return tuple(dict.fromkeys(map(plain_name, self.paths)))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "paths": list(self.names), "large": self.is_large, "orphan": self.is_orphan}


def is_weights(path: str) -> bool:
    """
    Whether a file holds weights, or may, by its name: of any format, or packed.

    Example:

    ```python
    >>> from hf_unlearn.cards.stored import is_weights
    >>> [is_weights(path) for path in ("pytorch_model-00001-of-00002.bin", "q4/model.gguf", "training_args.bin")]
    [True, True, False]

    ```
    """
    name = path.rsplit("/", 1)[-1].lower()
    return re.fullmatch(_WEIGHTS, name) is not None and _STATE.fullmatch(name) is None


def plain_name(path: str) -> str:
    """A path as far as it may be repeated: what no release holds can have any text as its name."""
    if kind_of(path) != "other" or _PLAIN_NAME.fullmatch(path):
        return path
    suffix = re.search(r"\.([a-z0-9]{1,11})$", path, re.ASCII | re.IGNORECASE)
    known = suffix is not None and (is_weights(path) or leftover(path) is not None)
    return f"*.{suffix[1].lower()}" if known else "a file of another name"
