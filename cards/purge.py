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
Takes out of a repository what [`~hf_unlearn.cards.history.find_original`] found in it, as far as the Hub lets anybody.

What cannot be undone comes last, each step leaves a state that a second run goes on from, and the tip of main is never
changed but for files that are themselves to be removed.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from hf_unlearn.cards.history import find_served, read_history
from hf_unlearn.cards.remote import HubError, RemoteFile, explained, read_tree
from hf_unlearn.cards.stored import MAIN, ORIGINAL, History, Served


@dataclass(frozen=True)
class PurgePlan:
    """
    What a purge removes. Nothing is read or written by making one.

    Attributes:
        repo_id (`str`): of the model.
        main (`str`): the tip of main when the plan was made; the purge refuses to start from another one.
        tags (`tuple[str, ...]`): deleted, because their tip serves it or their past holds it in small files.
        branches (`tuple[str, ...]`): deleted, because their tip serves it.
        removed_from_main (`tuple[str, ...]`): files that are no large ones, deleted at the tip of main by a commit.
        squashed (`tuple[str, ...]`): branches, main included, whose history becomes one commit: small files in the
            past go in no other way.
        large (`tuple[str, ...]`): SHA-256 of large files that are deleted for good, in all commits.
        stays (`tuple[str, ...]`): refs that the Hub lets nobody delete and that serve small files.
        contents (`tuple[tuple[str, str], ...]`): hash and rule of all that is to go.
    """

    repo_id: str
    main: str
    tags: tuple[str, ...]
    branches: tuple[str, ...]
    removed_from_main: tuple[str, ...]
    squashed: tuple[str, ...]
    large: tuple[str, ...]
    stays: tuple[str, ...]
    contents: tuple[tuple[str, str], ...]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that it can remove."""
        return not (self.tags or self.branches or self.removed_from_main or self.squashed or self.large)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; names of files are counted, as they can be any text."""
        content = asdict(self)
        del content["contents"]
        return {**content, "removed_from_main": len(self.removed_from_main)}


@dataclass(frozen=True)
class PurgeResult:
    """
    What a purge left.

    Attributes:
        plan ([`PurgePlan`]): that was followed.
        history ([`History`]): as it is read afterwards.
        remaining (`list[Served]`): what of the plan's contents is still served.
        main_kept (`bool`): whether the tip of main holds exactly what it held, but for what the plan removes.
    """

    plan: PurgePlan
    history: History
    remaining: list[Served]
    main_kept: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_dict(),
            "remaining": [one.to_dict() for one in self.remaining],
            "main": self.history.main.oid,
            "main_kept": self.main_kept,
        }


def plan_purge(history: History, found: Iterable[Served]) -> PurgePlan:
    """
    What it takes to remove what was found.

    A branch or tag that holds it in its past only is kept where large files alone are to go, because these are taken
    out of all commits. What the report at the tip of main lists is never removed, unless it is the original.

    Args:
        history ([`History`]): of the repository.
        found (`Iterable[Served]`): what is to be removed.

    Returns:
        [`PurgePlan`]

    Example:

    ```python
    >>> from hf_unlearn.cards.history import Commit, History, Ref, Served, ServedBy
    >>> from hf_unlearn.cards.purge import plan_purge

    >>> refs = [Ref("refs/heads/main", "branch", ("c2", "c1")), Ref("refs/tags/v0", "tag", ("c1",))]
    >>> history = History("org/name", refs, {oid: Commit(oid, "2026-01-01", {}) for oid in ("c2", "c1")})
    >>> by = (ServedBy("refs/heads/main", "branch", "main", "c1", 1), ServedBy("refs/tags/v0", "tag", "v0", "c1", 0))
    >>> one = Served("history-original", ("w.bin",), 9, "a" * 64, None, by, ("c1",), "2026-01-01")
    >>> plan = plan_purge(history, [one])
    >>> plan.tags, plan.squashed, len(plan.large)
    (('v0',), (), 1)

    ```
    """
    tags, branches, squashed, stays = set(), set(), set(), set()
    paths: set[str] = set()
    found = [one for one in found if one.rule == ORIGINAL or one.sha256 not in history.main.listed]
    for one in found:
        for by in one.refs:
            at_tip = by.behind == 0
            if by.ref == MAIN:
                if not one.is_large:
                    squashed.add("main")
                    paths |= {path for path, file in history.main.files.items() if file.oid == one.oid}
            elif by.kind == "tag" and (at_tip or not one.is_large):
                tags.add(by.name)
            elif by.kind == "branch" and at_tip:
                branches.add(by.name)
            elif by.kind == "branch" and not one.is_large:
                squashed.add(by.name)
            elif not one.is_large:
                stays.add(by.ref)
    return PurgePlan(
        repo_id=history.repo_id,
        main=history.main.oid,
        tags=tuple(sorted(tags)),
        branches=tuple(sorted(branches)),
        removed_from_main=tuple(sorted(paths)),
        squashed=tuple(sorted(squashed - branches)),
        large=tuple(sorted({one.sha256 for one in found if one.is_large and one.sha256 is not None})),
        stays=tuple(sorted(stays)),
        contents=tuple(sorted({(one.sha256 or one.oid or "", one.rule) for one in found})),
    )


def purge(
    api: HfApi, repo_id: str, plan: PurgePlan, progress: Callable[[int, int], None] = lambda done, total: None
) -> PurgeResult:
    """
    Follows a plan, then reads the history again to see what is left: nothing is taken for removed because a request
    was answered.

    The order is that of harm: refs first, then histories, then the bytes of large files. Whatever is interrupted in
    between, another audit finds the rest, and another purge removes it.

    Args:
        api ([`~huggingface_hub.HfApi`]): the client, with a token that may write.
        repo_id (`str`): of the model.
        plan ([`PurgePlan`]): made from its history.
        progress (`Callable[[int, int], None]`, *optional*): told how many commits were read again, and of how many.

    Returns:
        [`PurgeResult`]

    Raises:
        [`~hf_unlearn.cards.remote.HubError`]: the token may not write, which is asked first, main was changed
            meanwhile, or the Hub fails; then some of it may be done, and a second run finishes.
    """
    with explained(repo_id):
        api.auth_check(repo_id, write=True)
        files = [file for file in api.list_lfs_files(repo_id) if file.file_oid in plan.large] if plan.large else []
        before = _contents(read_tree(api, repo_id, _check_main(api, plan)))
        # Somebody else may have deleted one, or a request did whose answer was lost
        for tag in plan.tags:
            with suppress(RevisionNotFoundError):
                api.delete_tag(repo_id, tag=tag)
        for branch in plan.branches:
            with suppress(RevisionNotFoundError):
                api.delete_branch(repo_id, branch=branch)
        if plan.removed_from_main:
            api.create_commit(
                repo_id,
                [CommitOperationDelete(path) for path in plan.removed_from_main],
                commit_message="Remove files that must not be served",
                parent_commit=plan.main,
            )
        elif "main" in plan.squashed:
            _check_main(api, plan)  # squashing takes no parent to compare with
        for branch in plan.squashed:
            api.super_squash_history(repo_id, branch=branch, commit_message="One commit in place of the history")
        if files:
            api.permanently_delete_lfs_files(repo_id, files, rewrite_history=True)
    history = read_history(api, repo_id, progress)
    rules = dict(plan.contents)
    gone = {*plan.removed_from_main, *(path for path, content in before.items() if content in plan.large)}
    return PurgeResult(
        plan=plan,
        history=history,
        remaining=find_served(history, lambda path, digest, oid: rules.get(digest or "") or rules.get(oid or "")),
        main_kept=_contents(history.main.files)
        == {path: content for path, content in before.items() if path not in gone},
    )


def _check_main(api: HfApi, plan: PurgePlan) -> str:
    """The tip of main, which has to be that of the plan."""
    main = api.model_info(plan.repo_id, revision="main").sha
    if main != plan.main:
        raise HubError(f"main of {plan.repo_id} has changed meanwhile: look at the audit again, and purge then.")
    return plan.main


def _contents(files: dict[str, RemoteFile]) -> dict[str, str]:
    """Path -> hash of what the file holds."""
    return {path: file.sha256 or file.oid for path, file in files.items()}
