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
A release goes to the Hub as one commit: what was checked is what is sent, to where nothing serves the original.

All that is checked here comes before the first request, all that has to be asked before the first one that writes.
Whatever breaks off leaves main as it was or as it shall be; the next push finds out which, and goes on from there.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash

from hf_unlearn.cards.builder import FIGURES, MODEL_KINDS, render_files
from hf_unlearn.cards.check import Allowance, CheckResult, Gate, open_gate
from hf_unlearn.cards.disclosure import apply_disclosure
from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.history import base_weights, find_original, history_findings, read_history
from hf_unlearn.cards.licence import inherit_licence
from hf_unlearn.cards.merge import merge_card, own_text
from hf_unlearn.cards.receipt import Blocked, PushOptions, Receipt
from hf_unlearn.cards.release import MAX_KEPT_FILE, Release, ReleaseFile
from hf_unlearn.cards.remote import (
    GIT_ATTRIBUTES,
    HubError,
    RemoteFile,
    check_repo_id,
    connect,
    explained,
    read_file,
    read_tree,
)
from hf_unlearn.cards.report import REPORT_NAME, FileEntry, UnlearningReport
from hf_unlearn.cards.stored import History
from hf_unlearn.cards.weight_rules import read_header


CARD_NAME = "README.md"
_ATTEMPTS = 3


@dataclass(frozen=True)
class _Plan:
    """
    What would be sent, as the repository is now.

    Attributes:
        head (`str`, *optional*): the tip of main; `None` where there is no repository.
        private (`bool`, *optional*): whether it is.
        release (`Release`): all files, the card merged.
        changed, deleted (`list[str]`): the paths that differ at `head`, and those that are not in the release.
        there (`str`, *optional*): where the release is already: `main`, or the pull request that proposes it.
        commit (`str`, *optional*): the commit there.
        card (`bytes`, *optional*): that a pull request of its own proposes.
        result (`CheckResult`): what was let through.
        tags (`dict[str, str]`): those there are -> commit.
    """

    head: str | None
    private: bool | None
    release: Release
    changed: list[str]
    deleted: list[str]
    there: str | None
    commit: str | None
    card: bytes | None
    result: CheckResult
    tags: dict[str, str]


def push_release(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base: str | os.PathLike | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
    entities: Iterable[str] = (),
    token_decoder: Callable[[list[int]], str] | None = None,
    allowances: Iterable[Allowance] = (),
    licence_acknowledged: bool = False,
    token: str | None = None,
    options: PushOptions | None = None,
    progress: Callable[[int], None] = lambda size: None,
    say: Callable[[str], None] = lambda text: None,
) -> Receipt:
    """
    Checks a folder, and sends it to the Hub as one commit on top of the main that was looked at.

    The order: every local rule, on files, names and messages; then questions (who may write, what the repository
    serves, what its card says), and the rules once more on the merged card; then one commit, which the Hub refuses if
    main has moved meanwhile; then the tree at that commit is compared file by file, and the tag comes last. A request
    that fails is not repeated before the repository was read again.

    Args:
        folder (`str` or `os.PathLike`): the release.
        repo_id (`str`): `OWNER/NAME` of a model. It is created, private, where it does not exist.
        base, rows, entities, token_decoder, allowances, licence_acknowledged, progress:
            As in [`~hf_unlearn.cards.check.check_release`].
        token (`str`, *optional*): defaults to that of `HF_TOKEN` or of `hf auth login`.
        options ([`PushOptions`], *optional*): how it is sent.
        say (`Callable[[str], None]`, *optional*): told what is being done.

    Returns:
        [`Receipt`]

    Raises:
        [`Blocked`]: a rule is in the way; nothing was sent.
        `ValueError`: an argument does not fit, or a folder cannot be read; nothing was sent.
        [`~hf_unlearn.cards.remote.HubError`]: the Hub refuses or fails. Main is as it was, or has the release.
    """
    return _Push(
        check_repo_id(repo_id),
        connect(token, required=not (options and options.dry_run)),
        options or PushOptions(),
        base,
        say,
    ).run(
        folder,
        rows=rows,
        entities=entities,
        token_decoder=token_decoder,
        allowances=allowances,
        licence_acknowledged=licence_acknowledged,
        progress=progress,
    )


class _Push:
    """One push. Its methods are in the order in which they are called."""

    def __init__(
        self,
        repo_id: str,
        api: HfApi,
        options: PushOptions,
        base: str | os.PathLike | None,
        say: Callable[[str], None],
    ):
        if options.pull_request and options.tag is not None:
            raise ValueError("A pull request has no tag: leave one of the two out.")
        self._repo_id, self._api, self._options, self._base, self._say = repo_id, api, options, base, say
        self._base_files = None

    def run(self, folder: str | os.PathLike, **checked: Any) -> Receipt:
        start = time.monotonic()
        with ExitStack() as stack:
            gate = stack.enter_context(open_gate(folder, base=self._base, **checked))
            replaced = self._rendered(gate)
            result = gate.check(self._names(), replaced)
            if not result.passed:
                raise Blocked(result)
            receipt = Receipt(self._repo_id, self._api.endpoint, created=datetime.now(UTC).isoformat("T", "seconds"))
            receipt.checks.append("gate")
            receipt.dry_run = self._options.dry_run
            if self._api.token is False:  # which only a dry run may be without
                receipt.allowed = result.allowed
                self._enter_files(receipt, gate.with_files(replaced))
            else:
                self._send(gate, replaced, receipt)
            receipt.seconds = round(time.monotonic() - start, 3)
            return receipt

    # ---- Here ----

    def _names(self, tag: str | None = None) -> dict[str, str]:
        """All that leaves besides files."""
        names = {"the repository's name": self._repo_id, "the commit message": self._options.message}
        tag = self._options.tag or tag
        return names if tag is None else {**names, "the tag": tag}

    def _rendered(self, gate: Gate) -> dict[str, bytes | None]:
        """Card, report and pictures at the level of disclosure that was asked for, and none of another level."""
        if self._options.disclosure is None:
            return {}
        content = gate.release.content(REPORT_NAME)
        if content is None:
            return {}  # which the gate says
        report = apply_disclosure(UnlearningReport.from_dict(json.loads(content)), self._options.disclosure)
        files = gate.release.files
        report.files = [
            FileEntry(path, file.size, file.sha256) for path, file in files.items() if kind_of(path) in MODEL_KINDS
        ]
        licence = None if gate.base is None else inherit_licence(gate.base, acknowledged=True).metadata
        card = gate.release.content(CARD_NAME)
        rendered = render_files(
            report,
            existing=None if card is None else card.decode("utf-8", errors="replace"),
            model_name=self._repo_id.rpartition("/")[2],
            license=licence,
            notices=[path for path in files if kind_of(path) == "licence"],
            repair=self._options.repair_card,
        )
        return {**{path: None for path in FIGURES.values() if path in files}, **rendered}

    # ---- There: questions ----

    def _plan(self, gate: Gate, replaced: dict[str, bytes | None]) -> _Plan:
        """Looks at the repository as it is now, and applies every rule to what would be sent. Writes nothing."""
        private = self._look()
        if private is None:
            release = gate.with_files(replaced)
            result = gate.check(self._names(_tag_of(release)), replaced)
            if not result.passed:
                raise Blocked(result)
            return _Plan(None, None, release, list(release.files), [], None, None, None, result, {})
        self._say(f"Looking at what {self._repo_id} serves")
        history = read_history(self._api, self._repo_id)
        main = history.main
        if ".gitignore" in main.files:
            raise ValueError(
                f"{self._repo_id} has a .gitignore, by which the Hub leaves files out of a commit: delete it there."
            )
        files, proposed = self._with_card(gate, dict(replaced), main.oid, main.files)
        release = gate.with_files(files)
        result = gate.check(self._names(_tag_of(release)), files)
        if self._options.card_mode in ("keep", "pr"):
            stale = [finding for finding in result.blocking if finding.rule == "card-stale"]
            result.blocking = [finding for finding in result.blocking if finding not in stale]
            result.allowed += stale
        gate.judge(self._history_findings(history, release), result)
        if not result.passed:
            raise Blocked(result)
        changed = [path for path, file in release.files.items() if not _is_same(file, main.files.get(path))]
        deleted = sorted(main.files.keys() - release.files.keys() - {GIT_ATTRIBUTES})
        there, commit = (None, None) if changed or deleted else ("main", main.oid)
        if self._options.pull_request and there is None:
            for ref in history.refs:
                tip = history.commits[ref.commits[0]]
                if ref.kind == "pull request" and _is_tree(release, tip.files):
                    there, commit = ref.ref, tip.oid
        tags = {ref.name: ref.commits[0] for ref in history.refs if ref.kind == "tag"}
        if private and self._options.public:
            self._check_may_be_public(history, release)
        if proposed is not None and any(
            _is_same_content(proposed, history.commits[ref.commits[0]].files.get(CARD_NAME))
            for ref in history.refs
            if ref.kind == "pull request"
        ):
            proposed = None
        return _Plan(main.oid, private, release, changed, deleted, there, commit, proposed, result, tags)

    def _look(self) -> bool | None:
        """Whether the repository is private; `None` where there is none, and this token may create it."""
        with explained(self._repo_id):
            try:
                private = bool(self._api.model_info(self._repo_id).private)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise
                self._check_may_create()
                return None
            if not private and not self._options.public:
                raise ValueError(
                    f"{self._repo_id} is public: add --public if all may see the release, or name a private one."
                )
            if not self._options.pull_request:
                self._api.auth_check(self._repo_id, write=True)
        return private

    def _check_may_create(self) -> None:
        """A repository that is not there can be created, as far as that can be known without trying."""
        user = self._api.whoami()
        owner = self._repo_id.partition("/")[0]
        roles = {user["name"]: "admin", **{one["name"]: one.get("roleInOrg") for one in user.get("orgs", [])}}
        access = user.get("auth", {}).get("accessToken", {}).get("role")
        if owner not in roles or roles[owner] == "read" or access == "read":
            raise HubError(
                f"{self._repo_id} does not exist and this token may not create it: name a repository of yours, or use "
                "a token with write access."
            )
        if self._options.pull_request:
            raise ValueError(f"{self._repo_id} does not exist: a pull request needs a repository, so leave it out.")

    def _with_card(
        self, gate: Gate, files: dict[str, bytes | None], head: str, tree: dict[str, RemoteFile]
    ) -> tuple[dict[str, bytes | None], bytes | None]:
        """The files to replace with the card that shall be there, and one that a pull request proposes."""
        mode = self._options.card_mode
        if mode == "new" or CARD_NAME not in tree:
            return files, None
        ours = gate.with_files(files).content(CARD_NAME)
        with explained(self._repo_id):
            theirs = read_file(self._api, self._repo_id, tree[CARD_NAME], head)
        if theirs == ours:
            return files, None
        if mode in ("keep", "pr"):
            return {**files, CARD_NAME: theirs}, ours if mode == "pr" else None
        try:
            existing, generated = theirs.decode("utf-8"), ours.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(
                f"The card of {self._repo_id} is no text in UTF-8: replace it by --card-mode new."
            ) from None
        own, local = own_text(existing), own_text(generated)
        if not own:
            merged = generated
        elif local and local != own:
            raise ValueError(
                f"A person wrote in the card of the folder and in that of {self._repo_id}, and not the same: copy one "
                "to the other, or choose with --card-mode new or keep."
            )
        else:
            merged = merge_card(existing, generated, "merge", self._options.repair_card)
        return {**files, CARD_NAME: merged.encode("utf-8")}, None

    def _history_findings(self, history: History, release: Release) -> list[Finding]:
        """What the repository still serves of the original, in any state of it."""
        if self._base_files is None:
            files = [] if self._base is None else base_weights(self._base)
            report = UnlearningReport.from_dict(json.loads(release.content(REPORT_NAME)))
            if report.base.model_id is not None:
                # Of the same model in other formats, which the folder does not have
                try:
                    files += base_weights(api=self._api, repo_id=report.base.model_id, revision=report.base.revision)
                except HubError:
                    self._say("The base could not be looked at on the Hub: its folder is compared alone")
            self._base_files = files
        released = {file.sha256 for file in release.files.values()}
        served = find_original(history, self._base_files, released)
        return history_findings(self._repo_id, served)

    def _check_may_be_public(self, history: History, release: Release) -> None:
        """A private repository is made public only where it holds nothing that was not looked at."""
        for commit in history.commits.values():
            if commit.files.keys() - {GIT_ATTRIBUTES} and not _is_tree(release, commit.files):
                raise ValueError(
                    f"{self._repo_id} is private and holds more than this release: look at its history and make it "
                    "public in its settings, or name a new repository."
                )

    # ---- There: writing ----

    def _send(self, gate: Gate, replaced: dict[str, bytes | None], receipt: Receipt) -> None:
        plan, made = self._commit(gate, replaced, receipt)
        receipt.private = plan.private
        receipt.allowed = plan.result.allowed
        receipt.checks += ["history"] if plan.head is not None else []
        receipt.unchanged = [path for path in plan.release.files if path not in plan.changed]
        receipt.sent, receipt.deleted = plan.changed, plan.deleted
        self._enter_files(receipt, plan.release)
        if not self._options.pull_request:
            receipt.tag = self._free_tag(plan, receipt.commit)
        if receipt.dry_run:
            return
        if made is None:
            receipt.sent, receipt.deleted = [], []
            receipt.unchanged = list(plan.release.files)
        self._verify(plan.release, receipt)
        if receipt.tag is not None:
            self._tag(receipt.tag, receipt.commit)
        if plan.card is not None:
            receipt.card_pull_request = self._propose_card(plan.card)
        if plan.private and self._options.public and not self._options.pull_request:
            receipt.private = self._publish()

    def _commit(self, gate: Gate, replaced: dict[str, bytes | None], receipt: Receipt) -> tuple[_Plan, str | None]:
        """The plan that holds once the release is there, and the commit, if this call made it."""
        failure: Exception | None = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(attempt)
            plan = self._plan(gate, replaced)
            receipt.revision = plan.there or receipt.revision
            receipt.commit = plan.commit
            if plan.there is not None or self._options.dry_run:
                return plan, None
            try:
                if plan.head is None:
                    self._create()
                    plan = self._plan(gate, replaced)
                self._free_tag(plan, None)
                operations = self._operations(gate, plan)
                self._say(f"Sending {len(plan.changed)} files to {self._repo_id}")
                info = self._api.create_commit(
                    self._repo_id,
                    operations,
                    commit_message=self._options.message,
                    parent_commit=plan.head,
                    create_pr=self._options.pull_request,
                )
            except (HTTPError, RuntimeError) as error:  # the client's own, where the upload of a large file fails
                # It may have taken effect: the next round reads the repository before it sends anything
                failure = error if isinstance(error, HTTPError) else error.__cause__
                if not isinstance(failure, HTTPError):
                    raise
                if _is_final(failure):
                    break
                continue
            receipt.parent, receipt.commit = plan.head, info.oid
            receipt.revision = info.pr_revision or "main"
            return plan, info.oid
        with explained(self._repo_id):
            raise failure

    def _create(self) -> None:
        """A private repository, which nobody sees before it holds the release."""
        self._say(f"Creating {self._repo_id}, private")
        self._api.create_repo(self._repo_id, private=True)
        if not self._api.model_info(self._repo_id).private:
            raise HubError(f"{self._repo_id} was created, but it is not private: look at the owner's settings.")

    def _operations(self, gate: Gate, plan: _Plan) -> list[CommitOperationAdd | CommitOperationDelete]:
        if not gate.unchanged():
            raise ValueError("The weights were written to after they were checked: try again when nothing does.")
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for path in plan.changed:
            file = plan.release.files[path]
            # A small file may travel within the commit, where no hash of the storage protects it: it is read now
            is_small = file.size <= MAX_KEPT_FILE
            operation = CommitOperationAdd(path, file.read(0, file.size) if is_small else file.open())
            if operation.upload_info.sha256.hex() != file.sha256:
                raise ValueError(f"{path} was written to after it was checked: try again when nothing writes to it.")
            operations.append(operation)
        return operations + [CommitOperationDelete(path, is_folder=False) for path in plan.deleted]

    # ---- There: afterwards ----

    def _verify(self, release: Release, receipt: Receipt) -> None:
        """The tree at the commit has these files, with these hashes, and no other."""
        with explained(self._repo_id):
            tree = read_tree(self._api, self._repo_id, receipt.commit)
            wrong = [path for path, file in release.files.items() if not _is_same(file, tree.get(path))]
            more = tree.keys() - release.files.keys() - {GIT_ATTRIBUTES}
            if wrong or more:
                raise HubError(
                    f"{self._repo_id} does not hold what was sent ({len(wrong)} files differ, {len(more)} are too "
                    f"many) at {receipt.commit[:8]}: it has no tag, so do not use it."
                )
            receipt.checks.append("tree")
            receipt.parameters = self._count_parameters(release, receipt.commit)
        receipt.checks.append("parameters")

    def _count_parameters(self, release: Release, commit: str) -> int:
        """How many the Hub reads in the headers, which have to be as many as there are here."""
        names = [path for path in release.files if kind_of(path) == "weights"]
        counted = 0
        for name in names:
            header = self._api.parse_safetensors_file_metadata(self._repo_id, name, revision=commit)
            counted += sum(header.parameter_count.values())
        expected = sum(tensor.parameters for name in names for tensor in read_header(release.files[name])[1])
        if counted != expected:
            raise HubError(
                f"{self._repo_id} holds {counted:,} parameters at {commit[:8]} where {expected:,} were sent: do not "
                "use it."
            )
        return counted

    def _free_tag(self, plan: _Plan, commit: str | None) -> str:
        """The tag of the release: on its commit already, or on none."""
        tag = self._options.tag
        if tag is not None:
            if plan.tags.get(tag, commit) != commit:
                raise ValueError(f"{self._repo_id} has the tag {tag} on another commit: give another by --tag.")
            return tag
        # The same files may have been released before, and others since
        names = (_tag_of(plan.release) + (f"-{number}" if number > 1 else "") for number in count(1))
        return next(name for name in names if plan.tags.get(name, commit) == commit)

    def _tag(self, tag: str, commit: str) -> None:
        failure: Exception | None = None
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(attempt)
            with explained(self._repo_id):
                tags = {one.name: one.target_commit for one in self._api.list_repo_refs(self._repo_id).tags}
            if tag in tags:
                if tags[tag] != commit:
                    raise HubError(
                        f"The release is at {commit[:8]}, but somebody took its tag meanwhile: give another by --tag."
                    )
                return
            try:
                self._api.create_tag(self._repo_id, tag=tag, revision=commit)
            except HTTPError as error:
                failure = error
                if _is_final(error):
                    break
            else:
                return
        with explained(self._repo_id):
            raise failure

    def _propose_card(self, card: bytes) -> str | None:
        with explained(self._repo_id):
            info = self._api.create_commit(
                self._repo_id,
                [CommitOperationAdd(CARD_NAME, card)],
                commit_message=f"{self._options.message}: the card",
                create_pr=True,
            )
        return info.pr_revision

    def _publish(self) -> bool:
        with explained(self._repo_id):
            self._api.update_repo_settings(self._repo_id, private=False)
            private = bool(self._api.model_info(self._repo_id).private)
        if private:
            raise HubError(f"The release is in {self._repo_id}, but it is still private: look at its settings.")
        return private

    def _enter_files(self, receipt: Receipt, release: Release) -> None:
        receipt.files = [FileEntry(path, file.size, file.sha256) for path, file in release.files.items()]


def _is_final(error: Exception) -> bool:
    """Whether the Hub said no, so that asking again is of no use. 409 and 412 say that something was there first."""
    if not isinstance(error, HfHubHTTPError):
        return False
    status = error.response.status_code
    return status < 500 and status not in (408, 409, 412, 429)


def _is_same(file: ReleaseFile, remote: RemoteFile | None) -> bool:
    """Whether the Hub has this file."""
    if remote is None or remote.size != file.size:
        return False
    if remote.sha256 is not None:
        return remote.sha256 == file.sha256
    # No large one, so that it is small
    return remote.oid == git_hash(file.read(0, file.size))


def _is_same_content(content: bytes, remote: RemoteFile | None) -> bool:
    return _is_same(ReleaseFile(CARD_NAME, len(content), content), remote)


def _is_tree(release: Release, tree: Mapping[str, RemoteFile]) -> bool:
    """Whether a revision holds these files and no other."""
    return release.files.keys() == tree.keys() - {GIT_ATTRIBUTES} and all(
        _is_same(file, tree[path]) for path, file in release.files.items()
    )


def _tag_of(release: Release) -> str:
    """Named by what it holds: the same files have the same tag, whoever sends them again."""
    digest = hashlib.sha256()
    for path, file in release.files.items():
        digest.update(f"{path}\0{file.sha256}\0".encode())
    return f"release-{digest.hexdigest()[:12]}"
