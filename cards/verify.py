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
"""
Whether a revision on the Hub is the release that its report describes, and the one that a receipt is of.

Nothing is written there, and no token is needed where anybody may read. Whoever can write to a repository can write a
report to match: only a receipt, kept elsewhere, tells that a release as a whole was replaced.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from hf_unlearn.cards.file_names import kind_of, leftover, unsafe_content
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.history import base_weights
from hf_unlearn.cards.manifest import EDIT_NAME, MANIFEST_NAME, EditManifest, TensorRecord
from hf_unlearn.cards.metadata import parse_card
from hf_unlearn.cards.png import check_png
from hf_unlearn.cards.remote import (
    GIT_ATTRIBUTES,
    HubError,
    check_repo_id,
    explained,
)
from hf_unlearn.cards.remote_release import RemoteRelease, may_be_named
from hf_unlearn.cards.report import REPORT_NAME, SCHEMA_VERSION, FileEntry, UnlearningReport
from hf_unlearn.cards.stored import BaseFile
from hf_unlearn.cards.tensor_files import (
    CONFIG_NAME,
    INDEX_NAME,
    ModelFileError,
    TensorEntry,
    parse_json,
)
from hf_unlearn.cards.validation import validated
from hf_unlearn.cards.weight_rules import check_header, check_shards


CARD_NAME = "README.md"

# By which `hf-unlearn check` blocks a file as a whole, and by which it can be let through
_FILE_RULES = (
    "not-allowed",
    "pickle",
    "hidden-file",
    "file-name",
    "private",
    "png-format",
    "png-chunk",
    "png-trailing",
)

# As safetensors names the types that a report or a `config.json` may name
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_LISTED_BY_HUB = (
    "The hashes of large files are those that the Hub lists: --download fetches the files and hashes their bytes."
)
_NO_RECEIPT = (
    "Without a receipt, nothing tells whether the release as a whole was replaced, or its card edited: --receipt FILE."
)

Header = tuple[dict[str, str] | None, list[TensorEntry]]


@dataclass(frozen=True)
class ReceiptContent:
    """
    What a receipt of a push says that can be looked up again.

    Attributes:
        repo_id (`str`): where it was pushed to.
        revision (`str`): `main` or `refs/pr/N`.
        commit (`str`): the commit that the push made.
        tag (`str`, *optional*): the tag that it set.
        files (`list[FileEntry]`): the files of that commit.
        parameters (`int`, *optional*): of all weight files.
        allowed (`list[Finding]`): what the publisher let through by name.
    """

    repo_id: str
    revision: str
    commit: str
    tag: str | None
    files: list[FileEntry]
    parameters: int | None
    allowed: list[Finding]

    @property
    def allowed_files(self) -> set[str]:
        """Files that no release holds but by the word of its publisher."""
        paths = {entry.path for entry in self.files}
        return {finding.file for finding in self.allowed if finding.rule in _FILE_RULES and finding.file in paths}

    @classmethod
    def from_json(cls, content: bytes) -> "ReceiptContent":
        """
        Reads the bytes of a receipt.

        Raises:
            `ValueError`: they are no receipt that this version reads; no value is repeated.

        Example:

        ```python
        >>> from hf_unlearn.cards.verify import ReceiptContent
        >>> ReceiptContent.from_json(b"{}")
        Traceback (most recent call last):
            ...
        ValueError: The receipt has no schema 1: pass the file that `hf-unlearn push` wrote.

        ```
        """
        try:
            values = parse_json(content, "The receipt")
        except ModelFileError as error:
            raise ValueError(
                "The receipt is no JSON file of a receipt: pass the file that `hf-unlearn push` wrote."
            ) from error
        version = values.get("schema")
        if type(version) is int and version > 1:
            raise ValueError("The receipt is of a newer hf-unlearn: upgrade this one.")
        if type(version) is not int or version != 1:
            raise ValueError("The receipt has no schema 1: pass the file that `hf-unlearn push` wrote.")
        if values.get("dry_run") is True:
            raise ValueError("The receipt is of a dry run, which sent nothing: pass that of the push.")
        try:
            # Further keys say how the push went
            return validated({name: values.get(name) for name in cls.__dataclass_fields__}, cls, "")
        except ValueError as error:
            raise ValueError(
                "The receipt does not fit its schema: pass the file that `hf-unlearn push` wrote, as it was."
            ) from error


@dataclass
class VerifyResult:
    """
    What was found of a revision.

    Attributes:
        repo_id (`str`): the repository.
        revision (`str`): what was asked for.
        commit (`str`): the commit that it is.
        findings (`list[Finding]`): what is not as it should be. Files that no release holds are not named.
        files (`dict[str, str]`): path -> SHA-256 of every file that a release may hold.
        parameters (`int`, *optional*): of the weights, those of an adapter where there are no others.
        dtypes (`dict[str, int]`): data type, as safetensors names it -> parameters of this type.
        checks (`list[str]`): what was looked at.
        not_checked (`list[str]`): what was not, and how it can be: one sentence each.
    """

    repo_id: str
    revision: str
    commit: str
    findings: list[Finding] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    parameters: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def is_vouched_for(path: str) -> bool:
    """
    Whether a file may be in a release without a report that lists it, because the base has it too: code, and parts of
    a tokenizer in folders.

    Example:

    ```python
    >>> from hf_unlearn.cards.verify import is_vouched_for
    >>> [is_vouched_for(path) for path in ("modeling_tiny.py", "tokenizer.json", "README.md")]
    [True, False, False]

    ```
    """
    return kind_of(path) == "code" or (kind_of(path) == "tokenizer" and "/" in path)


def verify_release(
    api: HfApi,
    repo_id: str,
    revision: str | None = None,
    *,
    receipt: ReceiptContent | None = None,
    base: Sequence[BaseFile] | None = None,
    download: bool = False,
    progress: Callable[[int], None] = lambda files: None,
) -> VerifyResult:
    """
    Compares a revision with the report in it, and with a receipt. Nothing is written.

    Of large files the Hub's own hashes count, unless they are downloaded. Small files are downloaded and compared with
    what the Hub lists. Of weights, the headers are read.

    Args:
        api ([`~huggingface_hub.HfApi`]): the client, with or without a token.
        repo_id (`str`): of a model.
        revision (`str`, *optional*): branch, tag, `refs/pr/N` or commit; that of the receipt, or else `main`.
        receipt ([`ReceiptContent`], *optional*): of the push.
        base (`Sequence[BaseFile]`, *optional*): the base's weights, and what else [`is_vouched_for`], from
            [`~hf_unlearn.cards.history.base_weights`]; those of the model that the report names where unset.
        download (`bool`, *optional*, defaults to `False`): whether to download large files, one at a time, into a
            temporary folder, and to hash their bytes.
        progress (`Callable[[int], None]`, *optional*): told how many more files were looked at.

    Returns:
        [`VerifyResult`]: with findings of the rules

        - `verify-extra`: what no release holds, or what nothing vouches for;
        - `verify-missing`, `verify-hash`: a file of the report that is not there, or not the one in its list;
        - `verify-report`, `verify-card`, `verify-manifest`: one of these is missing, malformed or of another release;
        - `verify-weights`, `verify-parameters`: headers, index, number and type of the parameters;
        - `verify-base`: weights that the report says changed are the base's;
        - `verify-receipt`: another commit, tag or file than the receipt's.

    Raises:
        `ValueError`: the id is none.
        [`~hf_unlearn.cards.remote.HubError`]: the Hub cannot be asked, or has no such repository or revision.
    """
    check_repo_id(repo_id)
    revision = revision or (receipt.revision if receipt is not None else "main")
    with explained(repo_id):
        allowed = receipt.allowed_files if receipt is not None else ()
        release = RemoteRelease(api, repo_id, api.model_info(repo_id, revision=revision).sha, allowed)
        release.read(download, progress)
        result = VerifyResult(repo_id, revision, release.commit)
        _Verifier(api, release, result, download).verify(receipt, base)
    return result


class _Verifier:
    """One look at one commit."""

    def __init__(self, api: HfApi, release: RemoteRelease, result: VerifyResult, downloaded: bool) -> None:
        self._api, self._release, self._result, self._downloaded = api, release, result, downloaded

    def verify(self, receipt: ReceiptContent | None, base: Sequence[BaseFile] | None) -> None:
        result, release = self._result, self._release
        result.findings += release.findings
        result.files = {path: digest for path, digest in release.sha256.items() if may_be_named(path)}
        result.checks += ["tree", *(["bytes"] if self._downloaded else [])]
        if not self._downloaded and any(file.sha256 for file in release.files.values()):
            result.not_checked.append(_LISTED_BY_HUB)
        self._add(self._check_tree(receipt.allowed_files if receipt is not None else set()))
        self._add(self._check_weights())
        report = self._read_report()
        if report is not None:
            result.checks += ["report", "card", "parameters"]
            self._add(self._check_listed(report))
            self._add(self._check_card(report))
            self._add(self._check_parameters(report))
            base = self._base_of(report) if base is None else base
            if base is not None:
                result.checks.append("base")
                self._add(self._check_base(report, base))
        if MANIFEST_NAME in release.contents:
            result.checks.append("manifest")
            self._add(self._check_manifest(base))
        self._add(self._check_vouched(receipt, base))
        if receipt is None:
            result.not_checked.append(_NO_RECEIPT)
        else:
            result.checks.append("receipt")
            self._add(self._check_receipt(receipt))
        result.findings = list(dict.fromkeys(result.findings))

    def _add(self, findings: Iterator[Finding]) -> None:
        self._result.findings += findings

    def _check_tree(self, allowed: set[str]) -> Iterator[Finding]:
        if self._release.others:
            # Not by their names, which may be anything
            words = sorted({leftover(path) or "a file of another name" for path in self._release.others})
            count = len(self._release.others)
            message = f"{count} of its files are none that a release holds ({'; '.join(words)}): remove them."
            yield Finding("verify-extra", "the tree", message)
        if let_through := len(allowed & self._release.files.keys()):
            # That they are those of the receipt is compared with all others
            self._result.not_checked.append(
                f"What is in {let_through} file{'s' * (let_through > 1)} that the receipt says was let through."
            )
        for path, content in self._release.contents.items():
            kind = kind_of(path)
            if kind == "weights" or path in allowed:
                continue
            if kind == "picture":
                if check_png(path, content):
                    yield Finding("verify-extra", path, "it is no picture that holds nothing else: remove it.")
            elif words := unsafe_content(content):
                yield Finding("verify-extra", path, f"its content is {words}: remove it.")

    def _read_report(self) -> UnlearningReport | None:
        content = self._release.contents.get(REPORT_NAME)
        if content is None:
            message = "it is missing, so that nothing says what was released: push with `hf-unlearn push`."
        else:
            try:
                values = parse_json(content, REPORT_NAME)
                return UnlearningReport.from_dict(values)
            except ModelFileError:
                message = "it is no JSON file: build the card again, and push."
            except ValueError:
                # Which field is at fault is not said: its name may be anything
                version = values.get("schema_version")
                message = "it does not fit its schema: build the card again, and push."
                if type(version) is int and version > SCHEMA_VERSION:
                    message = f"it has schema version {version}, which this hf-unlearn does not read: upgrade it."
        self._result.findings.append(Finding("verify-report", REPORT_NAME, message))
        return None

    def _check_listed(self, report: UnlearningReport) -> Iterator[Finding]:
        yield from self._compare("verify", report.files, "the report")
        listed = {entry.path for entry in report.files}
        for path in self._release.files:
            # Those in a folder are in no list, see `_check_vouched`
            if kind_of(path) in ("weights", "index", "config", "tokenizer") and "/" not in path and path not in listed:
                yield Finding(
                    "verify-extra", path, "the report does not list it: it came in later, or by another way."
                )

    def _compare(self, rule: str, entries: list[FileEntry], where: str) -> Iterator[Finding]:
        """Files of a list that are missing or others. `verify` stands for one rule of its own for each of the two."""
        for number, entry in enumerate(entries, start=1):
            path = entry.path
            label = path if may_be_named(path) else f"file {number} in the list of {where}"
            if path in self._release.others:
                continue  # it was not read, and that it is there is a finding
            if path not in self._release.files:
                kind = "verify-missing" if rule == "verify" else rule
                yield Finding(kind, label, f"{where} lists it, and it is not there.")
            elif (self._release.files[path].size, self._release.sha256.get(path)) != (entry.size, entry.sha256):
                kind = "verify-hash" if rule == "verify" else rule
                yield Finding(kind, label, f"it is not the file that {where} lists: its size or SHA-256 is another.")

    def _check_card(self, report: UnlearningReport) -> Iterator[Finding]:
        content = self._release.contents.get(CARD_NAME)
        if content is None:
            yield Finding("verify-card", CARD_NAME, "it is missing: no release goes without it.")
            return
        if hashlib.sha256(self._release.contents[REPORT_NAME]).hexdigest().encode() not in content:
            message = "it does not name the hash of the report beside it: one of the two was changed."
            yield Finding("verify-card", CARD_NAME, message)
        try:
            named = parse_card(content.decode("utf-8"))[0].get("base_model")
        except ValueError:
            yield Finding("verify-card", CARD_NAME, "its metadata cannot be read: one line of it was changed.")
            return
        if named != report.base.model_id and named != [report.base.model_id]:
            yield Finding("verify-card", CARD_NAME, "its `base_model` is not the one that the report names.")

    def _check_weights(self) -> Iterator[Finding]:
        weights = self._release.weights
        if not weights:
            yield Finding(
                "verify-missing", "the weights", "there are none in safetensors files: nothing was released."
            )
        counted = [path for path in self._release.model_files or weights if path in self._release.headers]
        dtypes: Counter[str] = Counter()
        for path, (metadata, tensors) in self._release.headers.items():
            # Whether the base has metadata is not known here
            for finding in check_header(path, metadata, tensors, may_miss=True):
                yield replace(finding, rule="verify-weights")
            if path in counted:
                for tensor in tensors:
                    dtypes[tensor.dtype] += tensor.parameters
        self._result.dtypes, self._result.parameters = dict(dtypes), dtypes.total() if counted else None
        # A header that could not be read is a finding already
        if set(weights) == set(self._release.headers):
            for finding in check_shards(self._release.contents.get(INDEX_NAME), self._release.headers):
                yield replace(finding, rule="verify-weights")

    def _check_parameters(self, report: UnlearningReport) -> Iterator[Finding]:
        result, model_files = self._result, self._release.model_files
        if not model_files or not set(model_files) <= set(self._release.headers):
            return
        if report.footprint is None:
            result.not_checked.append(
                "The report has no footprint, so that the number of parameters is compared with none."
            )
        elif result.parameters != report.footprint.total_parameters:
            total = report.footprint.total_parameters
            message = f"they have {result.parameters:,} parameters, where the report has {total:,}."
            yield Finding("verify-parameters", "the weights", message)
        try:
            config = parse_json(self._release.contents.get(CONFIG_NAME, b"{}"), CONFIG_NAME)
        except ModelFileError:
            yield Finding(
                "verify-parameters", CONFIG_NAME, "it is no JSON object, so that it names no type of weights."
            )
            return
        named = [report.base.dtype, *(config.get(key) for key in ("dtype", "torch_dtype"))]
        expected = {_DTYPES[name] for name in named if isinstance(name, str) and name in _DTYPES}
        main = max(result.dtypes, key=lambda dtype: result.dtypes[dtype], default=None)
        if expected and main not in expected:
            message = f"they are {main}, but report and config.json name {' and '.join(sorted(expected))}."
            yield Finding("verify-parameters", "the weights", message)

    def _base_of(self, report: UnlearningReport) -> Sequence[BaseFile] | None:
        """The files of the model that the report names, where it can be asked for."""
        base_id, revision = report.base.model_id, report.base.revision
        if base_id is None:
            self._result.not_checked.append(
                "The report names no base on the Hub: --base names the one to compare with."
            )
            return None
        if revision is None:
            self._result.not_checked.append(f"The report names no revision of {base_id}: compared with its main.")
        try:
            return base_weights(api=self._api, repo_id=base_id, revision=revision, also=is_vouched_for)
        except HubError as error:
            if not isinstance(error.__cause__, (RepositoryNotFoundError, RevisionNotFoundError)):
                raise
            message = (
                f"The base, {base_id}, cannot be read at the revision that the report names: --base names another."
            )
            self._result.not_checked.append(message)
            return None

    def _check_base(self, report: UnlearningReport, base: Sequence[BaseFile]) -> Iterator[Finding]:
        """That no weight file is the base's but those in which nothing changed."""
        model_files = self._release.model_files
        if not model_files:
            return
        theirs = {file.sha256 for file in base}
        same = [path for path in model_files if self._release.sha256.get(path) in theirs]
        if len(same) == len(model_files):
            yield Finding("verify-base", "the weights", "they are the base's, bit for bit: nothing was unlearned.")
            return
        changed = {module.name for module in report.footprint.modules} if report.footprint is not None else set()
        if same and not changed:
            # As under `sealed`
            message = f"{len(same)} weight files are the base's, and the report does not say which tensors changed."
            self._result.not_checked.append(message)
        for path in same:
            _, tensors = self._release.headers.get(path, (None, []))
            if any(tensor.name in changed for tensor in tensors):
                message = "it is the base's, bit for bit, but holds weights that the report says changed."
                yield Finding("verify-base", path, message)

    def _check_manifest(self, base: Sequence[BaseFile] | None) -> Iterator[Finding]:
        try:
            manifest = EditManifest.from_json(self._release.contents[MANIFEST_NAME])
        except ValueError:
            yield Finding("verify-manifest", MANIFEST_NAME, "it is no edit manifest: write it again, and push.")
            return
        new = {entry.path: FileEntry(entry.path, entry.size, entry.sha256) for entry in manifest.new_files}
        there = self._release.model_files
        if there:
            yield from self._compare("verify-manifest", list(new.values()), "the edit manifest")
            if set(there) - set(new):
                message = "it does not list all weight files that are there: it is of another release."
                yield Finding("verify-manifest", MANIFEST_NAME, message)
            stored = {
                tensor.name: (tensor.dtype, list(tensor.shape))
                for path in there
                for tensor in self._release.headers.get(path, (None, []))[1]
            }
            if set(there) <= set(self._release.headers) and stored != _shapes(manifest.new_tensors):
                message = "its tensors are not those of the weights that are there: it is of another release."
                yield Finding("verify-manifest", MANIFEST_NAME, message)
        if EDIT_NAME in self._release.files or not there:
            if manifest.edit_file is None:
                message = f"it names no {EDIT_NAME}, which is what there should be: write it again, and push."
                yield Finding("verify-manifest", MANIFEST_NAME, message)
            else:
                yield from self._compare("verify-manifest", [manifest.edit_file], "the edit manifest")
        if base is not None:
            theirs = {file.path: file.sha256 for file in base}
            if any(theirs.get(entry.path, entry.sha256) != entry.sha256 for entry in manifest.base_files):
                message = "it is of another base: the hashes of base files in it are others."
                yield Finding("verify-manifest", MANIFEST_NAME, message)
        if f"{MANIFEST_NAME}.sig" in self._release.files:
            self._result.not_checked.append("The signature of the edit manifest: `hf-unlearn apply` checks it.")

    def _check_vouched(self, receipt: ReceiptContent | None, base: Sequence[BaseFile] | None) -> Iterator[Finding]:
        """What no report lists, because the base has it too: code, and what is in folders."""
        known = {(file.path, file.sha256) for file in [*(base or ()), *(receipt.files if receipt is not None else ())]}
        for path in self._release.files:
            if is_vouched_for(path) and (path, self._release.sha256.get(path)) not in known:
                message = "neither the base nor a receipt has it, or not this: see what it does, or remove it."
                yield Finding("verify-extra", path, message)

    def _check_receipt(self, receipt: ReceiptContent) -> Iterator[Finding]:
        result = self._result
        if receipt.repo_id != result.repo_id:
            yield Finding("verify-receipt", "the repository", "the receipt is of another one.")
        if receipt.commit != result.commit:
            message = (
                f"it is commit {result.commit[:12]}, and the receipt is of {_short(receipt.commit)}: it was moved, or "
                "another one was meant."
            )
            yield Finding("verify-receipt", "the revision", message)
        if receipt.tag is not None:
            try:
                tagged = self._api.model_info(result.repo_id, revision=receipt.tag).sha
            except RevisionNotFoundError:
                yield Finding("verify-receipt", "the tag", "the tag of the receipt is no longer there.")
            else:
                if tagged != receipt.commit:
                    message = f"it is now at {tagged[:12]}, and the receipt is of {_short(receipt.commit)}."
                    yield Finding("verify-receipt", "the tag", message)
        yield from self._compare("verify-receipt", receipt.files, "the receipt")
        known = {entry.path for entry in receipt.files}
        for path in self._release.files:
            if path not in known and path != GIT_ATTRIBUTES:
                yield Finding("verify-receipt", path, "the receipt does not list it: it came in later.")
        # A receipt counts all weight files
        headers = self._release.headers.values()
        counted = sum(tensor.parameters for _, tensors in headers for tensor in tensors)
        if receipt.parameters is not None and receipt.parameters != counted:
            yield Finding(
                "verify-receipt", "the weights", "they have another number of parameters than in the receipt."
            )


def _shapes(tensors: Mapping[str, TensorRecord]) -> dict[str, tuple[str, list[int]]]:
    return {name: (record.dtype, record.shape) for name, record in tensors.items()}


def _short(commit: str) -> str:
    """Of a receipt, which may hold anything."""
    return commit[:12] if commit.isalnum() and commit.isascii() else "none that there can be"
