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
"""What every ref of a repository serves: its whole history, read without a download, and the original found in it."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from os import PathLike

from huggingface_hub import GitRefInfo, HfApi, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from huggingface_hub.utils import get_session

from hf_unlearn.cards.file_names import leftover
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.metadata import parse_card
from hf_unlearn.cards.release import read_release
from hf_unlearn.cards.remote import RemoteFile, explained, read_file, read_tree
from hf_unlearn.cards.report import REPORT_NAME
from hf_unlearn.cards.stored import (
    LEFTOVER,
    MAIN,
    ORIGINAL,
    UNKNOWN,
    BaseFile,
    Commit,
    History,
    LargeFile,
    Ref,
    RefKind,
    Served,
    ServedBy,
    is_weights,
)


# What a search of a repository's history cannot answer, whatever it finds
CANNOT_SEE = (
    "copies that were downloaded, cloned or cached",
    "duplicates and forks under other names",
    "commits that no branch, tag or pull request reaches, but for their large files",
    "weights that were converted, quantized or packed under a name that says nothing",
)

_CHUNK = 2**20
_MAX_REPORT = 16 * 2**20


def read_history(api: HfApi, repo_id: str, progress: Callable[[int, int], None] = lambda done, total: None) -> History:
    """
    Reads every branch, tag, conversion and pull request of a model, the tree of each commit that they reach, and the
    list of the large files. Small files only are downloaded: reports, and weights that are no large files.

    Args:
        api ([`~huggingface_hub.HfApi`]): the client.
        repo_id (`str`): of the model.
        progress (`Callable[[int, int], None]`, *optional*): told how many commits were read, and of how many.

    Returns:
        [`History`]

    Raises:
        [`~hf_unlearn.cards.remote.HubError`]: the Hub refuses or fails.
    """
    with explained(repo_id):
        found = api.list_repo_refs(repo_id, include_pull_requests=True)
        kinds: dict[RefKind, list[GitRefInfo]] = {
            "branch": found.branches,
            "tag": found.tags,
            "conversion": found.converts,
            "pull request": found.pull_requests or [],
        }
        refs, created = [], {}
        for kind, infos in kinds.items():
            for info in infos:
                # By the commit, not by the name: a branch and a tag can have the same one
                commits = api.list_repo_commits(repo_id, revision=info.target_commit)
                created |= {commit.commit_id: commit.created_at.isoformat() for commit in commits}
                refs.append(Ref(info.ref, kind, tuple(commit.commit_id for commit in commits)))
        history = History(repo_id, refs, {})
        reports: dict[str, tuple[frozenset[str], tuple[str, str | None] | None]] = {}
        for done, (oid, date) in enumerate(created.items(), start=1):
            files = read_tree(api, repo_id, oid)
            listed, base = frozenset(), None
            report = files.get(REPORT_NAME)
            if report is not None and report.size <= _MAX_REPORT:
                if report.oid not in reports:
                    reports[report.oid] = _read_report(read_file(api, repo_id, report, oid))
                listed, base = reports[report.oid]
            for file in files.values():
                if file.sha256 is None and is_weights(file.path) and file.oid not in history.digests:
                    content = read_file(api, repo_id, file, oid)
                    history.digests[file.oid] = hashlib.sha256(content).hexdigest()
            history.commits[oid] = Commit(oid, date, files, listed, base)
            progress(done, len(created))
        history.large = _list_large(api, repo_id)
        history.gone = _gone(api, history)
    return history


def _read_report(content: bytes) -> tuple[frozenset[str], tuple[str, str | None] | None]:
    """
    What a report of any version lists, and the base that it names. One that cannot be read lists nothing, so that
    the weights beside it are unknown ones.
    """
    try:
        report = json.loads(content)
    except (ValueError, RecursionError):
        return frozenset(), None
    report = report if isinstance(report, dict) else {}
    entries, base = report.get("files"), report.get("base")
    digests = (
        [entry.get("sha256") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    )
    named = None
    if isinstance(base, dict) and isinstance(base.get("model_id"), str):
        revision = base.get("revision")
        named = base["model_id"], revision if isinstance(revision, str) else None
    return frozenset(digest for digest in digests if isinstance(digest, str)), named


def _list_large(api: HfApi, repo_id: str) -> dict[str, LargeFile] | None:
    """The large files; `None` where the token may not list them."""
    try:
        files = list(api.list_lfs_files(repo_id))
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            return None
        raise
    return {
        file.file_oid: LargeFile(file.file_oid, file.filename, file.size, file.pushed_at.isoformat()) for file in files
    }


def _gone(api: HfApi, history: History) -> set[str]:
    """The large files that a commit names and the storage does not have. Those of other names count as served."""
    asked: dict[str, bool] = {}
    for oid, commit in history.commits.items():
        for path, file in commit.files.items():
            digest = file.sha256
            if digest is None or digest in asked or (history.large is not None and digest in history.large):
                continue
            if is_weights(path) or leftover(path) is not None:
                asked[digest] = _is_stored(api, history.repo_id, path, oid)
    return {digest for digest, is_stored in asked.items() if not is_stored}


def _is_stored(api: HfApi, repo_id: str, path: str, commit: str) -> bool:
    """
    Whether the bytes of a large file are there. The Hub answers a HEAD request from the commit alone, so the storage
    is asked for one byte. Where neither says that there is nothing, there is something.
    """
    try:
        metadata = api.get_hf_file_metadata(
            url=hf_hub_url(repo_id, path, revision=commit, endpoint=api.endpoint), timeout=30
        )
    except EntryNotFoundError:
        return False
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):  # such as a gated model: others may get it
            return True
        raise
    # Without the token, which is the Hub's; by GET, as the address is signed for that
    with get_session().stream("GET", metadata.location, headers={"Range": "bytes=0-0"}) as answer:
        if answer.status_code != 200:  # which would be all of it
            answer.read()
        return answer.status_code not in (404, 410)


def base_weights(
    folder: str | PathLike | None = None,
    *,
    api: HfApi | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    also: Callable[[str], bool] = lambda path: False,
    progress: Callable[[int], None] = lambda size: None,
) -> list[BaseFile]:
    """
    The weight files of the base, of every format, by which they are found again: those of a folder, those that the
    Hub lists, or both.

    Args:
        folder (`str` or `os.PathLike`, *optional*): the base on disk; links into the Hub's cache are followed.
        api ([`~huggingface_hub.HfApi`], *optional*): the client.
        repo_id (`str`, *optional*): the base on the Hub. Only weights that are no large files are downloaded.
        revision (`str`, *optional*): its revision; main where unset.
        also (`Callable[[str], bool]`, *optional*): whether a path, of no weight file, is wanted as well.
        progress (`Callable[[int], None]`, *optional*): told how many bytes of the folder were read.

    Returns:
        `list[BaseFile]`: empty files are left out.

    Raises:
        `ValueError`: the folder cannot be read.
        [`~hf_unlearn.cards.remote.HubError`]: the Hub refuses or fails.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_unlearn.cards.history import base_weights

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "pytorch_model.bin").write_bytes(b"weights")
    ...     _ = Path(folder, "config.json").write_text("{}")
    ...     [file] = base_weights(folder)
    >>> file.path, file.sha256[:8], file.oid[:8]
    ('pytorch_model.bin', '9a129038', '3ab313ff')

    ```
    """
    files = []
    if folder is not None:
        with read_release(folder, hub_links=True) as release:
            for path, file in release.files.items():
                if not (is_weights(path) or also(path)) or file.size == 0:
                    continue
                sha256, oid = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % file.size)
                with file.open() as stream:
                    while chunk := stream.read(_CHUNK):
                        sha256.update(chunk)
                        oid.update(chunk)
                        progress(len(chunk))
                files.append(BaseFile(path, file.size, sha256.hexdigest(), oid.hexdigest()))
    if api is not None and repo_id is not None:
        with explained(repo_id):
            revision = api.model_info(repo_id, revision=revision).sha  # one state, whatever is pushed meanwhile
            for path, file in read_tree(api, repo_id, revision).items():
                if not (is_weights(path) or also(path)) or file.size == 0:
                    continue
                if file.sha256 is not None:
                    files.append(BaseFile(path, file.size, file.sha256, None))
                else:
                    digest = hashlib.sha256(read_file(api, repo_id, file, revision)).hexdigest()
                    files.append(BaseFile(path, file.size, digest, file.oid))
    return list(dict.fromkeys(files))


def named_base(api: HfApi, history: History) -> tuple[str, str | None] | None:
    """
    Id and revision of the base that the report at the tip of main names, or else its card, or else the newest report
    in its past; `None` where none does.

    Raises:
        [`~hf_unlearn.cards.remote.HubError`]: the Hub refuses or fails.
    """
    main = history.main
    if main.base is not None:
        return main.base
    named, card = None, main.files.get("README.md")
    if card is not None and card.size <= _MAX_REPORT:
        with explained(history.repo_id):
            content = read_file(api, history.repo_id, card, main.oid)
        try:
            metadata, _ = parse_card(content.decode())
        except ValueError:
            metadata = {}  # a card that cannot be read names nothing
        named = metadata.get("base_model")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
    if isinstance(named, str):
        return named, None
    earlier = (history.commits[oid].base for oid in history.ref(MAIN).commits)
    return next((base for base in earlier if base is not None), None)


def released_hashes(history: History, base: Iterable[BaseFile]) -> frozenset[str]:
    """
    SHA-256 of the files at the tip of main that the report beside them lists: shards that did not change legitimately
    are the base's. Empty where there is no release, or where all of the base's files of one format are among them.
    """
    released = history.main.listed & history.hashes(history.main)
    formats: dict[str, set[str]] = {}
    for file in base:
        formats.setdefault(file.path.rpartition(".")[2], set()).add(file.sha256)
    return frozenset() if any(whole <= released for whole in formats.values()) else frozenset(released)


def find_original(history: History, base: Iterable[BaseFile], released: Collection[str]) -> list[Served]:
    """
    What a repository serves and should not: weight files of the base under any name, weights that no report lists,
    and what trainers leave behind, in every commit that a ref reaches and among the large files that none reaches.

    Args:
        history ([`History`]): of the repository.
        base (`Iterable[BaseFile]`): the original; without it all that no report lists is unknown.
        released (`Collection[str]`): SHA-256 of the files of the release, the one at main or the one that is to be
            pushed. Shards that did not change share theirs with the base.

    Returns:
        `list[Served]`: the original first, then what is unknown, then what was left behind.

    A file is known where the report of *some* commit that holds it lists it: its bytes are the same in all others.

    Example:

    ```python
    >>> from hf_unlearn.cards.history import BaseFile, Commit, History, Ref, find_original
    >>> from hf_unlearn.cards.remote import RemoteFile

    >>> name = "model.safetensors"
    >>> old, new = (RemoteFile(name, 12, digit * 40, digit * 64) for digit in "ab")
    >>> commits = {"c2": Commit("c2", "2026-01-02", {name: new}), "c1": Commit("c1", "2026-01-01", {name: old})}
    >>> history = History("org/name", [Ref("refs/heads/main", "branch", ("c2", "c1"))], commits)
    >>> [served] = find_original(history, [BaseFile(name, 12, "a" * 64, None)], released={"b" * 64})
    >>> served.rule, served.refs[0].name, served.refs[0].behind
    ('history-original', 'main', 1)

    ```
    """
    base = list(base)
    digests = {file.sha256 for file in base}.difference(released)
    oids = {file.oid for file in base if file.oid is not None and file.sha256 in digests}
    known = set(released).union(*(commit.listed & history.hashes(commit) for commit in history.commits.values()))

    def rule_of(path: str, digest: str | None, oid: str | None) -> str | None:
        if digest in digests or oid in oids:
            return ORIGINAL
        if is_weights(path) and digest not in known:
            return UNKNOWN
        return LEFTOVER if leftover(path) is not None else None

    return find_served(history, rule_of)


def find_served(history: History, rule_of: Callable[[str, str | None, str | None], str | None]) -> list[Served]:
    """
    The contents that a rule is about, with all refs and commits that serve them, and those that only the storage does.

    Args:
        history ([`History`]): of the repository.
        rule_of (`Callable`): path, SHA-256 where it is known, and SHA-1 of the git blob where it is no large file ->
            rule, or `None`.

    Returns:
        `list[Served]`: sorted as [`find_original`] does.
    """
    found: dict[tuple[str, str], tuple[RemoteFile, list[str], list[str]]] = {}
    reached = set()
    for commit in history.commits.values():
        for path, file in commit.files.items():
            reached.add(file.sha256)
            rule = rule_of(path, history.sha256(file), file.oid if file.sha256 is None else None)
            if rule is None or file.size == 0 or file.sha256 in history.gone:
                continue
            _, paths, commits = found.setdefault((rule, file.sha256 or file.oid), (file, [], []))
            paths.append(path)
            commits.append(commit.oid)
    served = []
    for (rule, _), (file, paths, commits) in found.items():
        by, holding = [], set(commits)
        for ref in history.refs:
            places = [place for place, oid in enumerate(ref.commits) if oid in holding]
            if places:
                by.append(ServedBy(ref.ref, ref.kind, ref.name, ref.commits[places[0]], places[0]))
        served.append(
            Served(
                rule,
                tuple(dict.fromkeys(paths)),
                file.size,
                history.sha256(file),
                None if file.sha256 is not None else file.oid,
                tuple(by),
                tuple(dict.fromkeys(commits)),
                min(history.commits[oid].created for oid in commits),
            )
        )
    for digest, large in (history.large or {}).items():
        rule = rule_of(large.path, digest, None)
        if digest not in reached and rule is not None:
            served.append(Served(rule, (large.path,), large.size, digest, None, (), (), large.pushed))
    order = (ORIGINAL, UNKNOWN, LEFTOVER)
    return sorted(served, key=lambda one: (order.index(one.rule), one.is_orphan, one.paths))


_SAYS = {
    ORIGINAL: ("weight file of the original", "weight files of the original"),
    UNKNOWN: ("weight file that no report lists", "weight files that no report lists"),
    LEFTOVER: ("file that a trainer left behind", "files that a trainer left behind"),
}


def history_findings(repo_id: str, served: Iterable[Served]) -> list[Finding]:
    """
    What [`find_original`] found as findings, by which a push is blocked: one for each rule and ref.

    Args:
        repo_id (`str`): the repository.
        served (`Iterable[Served]`): what was found in it.

    Returns:
        `list[Finding]`: of the rules `history-original`, `history-unknown` and `history-leftover`; `file` is the ref,
        or `large files` for what no ref reaches.
    """
    groups: dict[tuple[str, str], list[tuple[Served, ServedBy | None]]] = {}
    for one in served:
        for by in one.refs or (None,):
            groups.setdefault((one.rule, "large files" if by is None else by.ref), []).append((one, by))
    findings = []
    for (rule, ref), entries in groups.items():
        names = list(dict.fromkeys(name for one, _ in entries for name in one.names))
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        what = f"{len(entries)} {_SAYS[rule][len(entries) > 1]} ({shown})"
        nearest = min((by for _, by in entries if by is not None), key=lambda by: by.behind, default=None)
        if nearest is None:
            where = "no ref reaches them, and the storage still serves"
        else:
            where = f"commit {nearest.commit[:8]}, {_distance(nearest.behind)}, serves"
        todo = (
            "the Hub deletes no pull request: use a new repository"
            if ref.startswith("refs/pr/") and any(not one.is_large for one, _ in entries)
            else f"use a new repository, or `hf-unlearn audit {repo_id} --purge{'' if rule == ORIGINAL else ' --all'}`"
        )
        findings.append(Finding(rule, ref, f"{where} {what}: {todo}."))
    return findings


def _distance(behind: int) -> str:
    return "its tip" if behind == 0 else f"{behind} commit{'s' * (behind > 1)} behind its tip"
