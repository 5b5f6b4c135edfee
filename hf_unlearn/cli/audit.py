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
Look through the whole history of a repository on the Hub for the original of a model that was made to forget.

```bash
hf-unlearn audit org/name                       # the base is the one that its report or card names
hf-unlearn audit org/name --base DIR|ID[@REV]   # weights on disk, or another repository
hf-unlearn audit org/name --purge               # shows what it would remove, and asks
```

Exit code 0 where nothing was found, 1 where something is still served, 2 where the command was not understood. Reading
needs no token in a public repository; large files that no ref reaches are listed only for those who may write.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from tqdm import tqdm

from hf_unlearn._version import __version__
from hf_unlearn.cards.history import (
    CANNOT_SEE,
    base_weights,
    find_original,
    history_findings,
    named_base,
    read_history,
    released_hashes,
)
from hf_unlearn.cards.purge import PurgePlan, PurgeResult, plan_purge, purge
from hf_unlearn.cards.remote import HubError, check_repo_id
from hf_unlearn.cards.report import write_text
from hf_unlearn.cards.stored import LEFTOVER, ORIGINAL, UNKNOWN, BaseFile, History, Served, ServedBy

from . import UsageError, run
from .diff import Parser
from .hub import add_token_argument, connect_with


_WHAT = {ORIGINAL: "original", UNKNOWN: "unknown weights", LEFTOVER: "left by a trainer"}


@dataclass
class Audit:
    """
    What one look through a history found.

    Attributes:
        history ([`History`]): that was read.
        base (`list[BaseFile]`): the weights that were looked for.
        base_name (`str`, *optional*): what the base is called; `None` where none is known.
        found (`list[Served]`): what is served and should not be.
    """

    history: History
    base: list[BaseFile]
    base_name: str | None
    found: list[Served]

    def of(self, history: History) -> "Audit":
        """The same question to a later state."""
        return Audit(history, self.base, self.base_name, _find(history, self.base))

    def to_dict(self) -> dict[str, Any]:
        return {
            "clean": not self.found,
            **self.history.to_dict(),
            "base": None if self.base_name is None else {"name": self.base_name, "weight_files": len(self.base)},
            "found": [one.to_dict() for one in self.found],
            "findings": [vars(finding) for finding in history_findings(self.history.repo_id, self.found)],
            "cannot_see": list(cannot_see(self.history)),
        }


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn audit",
        description="Look through all branches, tags, pull requests and commits of a model on the Hub for the "
        "original. Exit code 1 where something is still served.",
        allow_abbrev=False,
    )
    parser.add_argument("repo", metavar="REPO", help="The repository, as OWNER/NAME.")
    parser.add_argument(
        "--base",
        metavar="DIR|ID[@REV]",
        help="The original: a folder, or a repository at a revision; `none` to look for unknown weights only. "
        "Defaults to what the report or the card of REPO names.",
    )
    parser.add_argument("--purge", action="store_true", help="Remove the original as far as the Hub allows.")
    parser.add_argument(
        "--all", action="store_true", help="With --purge: also unknown weights and what trainers left behind."
    )
    parser.add_argument("--yes", action="store_true", help="With --purge: do not ask.")
    parser.add_argument("--receipt", metavar="FILE", help="Write what --json prints into this file.")
    add_token_argument(parser)
    parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="Print rule and ref of what was found, and no more."
    )
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if (args.yes or args.all) and not args.purge:
        raise UsageError("--yes and --all are about removing: add --purge.")
    if args.receipt is not None and (
        os.path.isdir(args.receipt) or not os.path.isdir(os.path.dirname(args.receipt) or ".")
    ):
        raise UsageError("--receipt names no file in a folder that is there.")
    try:
        check_repo_id(args.repo)
    except ValueError as error:
        raise UsageError(str(error)) from error
    api = connect_with(args, required=args.purge)
    audit = look(api, args)
    content = {"schema": 1, "tool_version": __version__, "endpoint": api.endpoint, **audit.to_dict()}
    result = None
    if not args.purge:
        _print(args, audit, None)
    else:
        plan = plan_purge(audit.history, [one for one in audit.found if args.all or one.rule == ORIGINAL])
        content["plan"] = plan.to_dict()
        # With --json, the one result is printed at the end
        _print(args, audit, plan, file=sys.stderr if args.json else sys.stdout)
        if not plan.is_empty and _is_confirmed(args):
            with _progress("Reading again", args.quiet) as progress:
                result = purge(api, args.repo, plan, progress)
            audit = audit.of(result.history)
            content |= {"purge": result.to_dict(), "after": audit.to_dict()}
            if not args.json and not args.quiet:
                print("\n" + as_result(result, audit))
    content["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    if args.json:
        print(json.dumps(content, indent=2))
    if args.receipt is not None:
        try:
            write_text(args.receipt, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise OSError(f"The receipt cannot be written ({os.strerror(error.errno)}): use --json.") from error
    return 1 if audit.found or (result is not None and not result.main_kept) else 0


def look(api: HfApi, args: argparse.Namespace) -> Audit:
    """
    Reads the history, and finds the original in it.

    Raises:
        `UsageError`: `--base` is neither a folder nor an id.
        [`~hf_unlearn.cards.remote.HubError`]: the Hub refuses or fails.
    """
    given = None if args.base in (None, "none") else args.base
    if given is not None and not os.path.isdir(given):
        _check_id(given)
    with _progress("Reading commits", args.quiet) as progress:
        history = read_history(api, args.repo, progress)
    if given is not None and os.path.isdir(given):
        try:
            with _progress("Hashing the base", args.quiet, unit="B") as progress:
                base, name = base_weights(given, progress=lambda size: progress(size, None)), "a folder"
        except ValueError as error:
            raise UsageError(str(error)) from error
        if not base:
            raise UsageError("The folder of --base holds no weights: name the folder of a model.")
    else:
        named = _split(given) if given is not None else None if args.base == "none" else named_base(api, history)
        base, name = [], None
        if named is not None and (given is not None or _is_id(named[0])):
            repo_id, revision = named
            name = repo_id if revision is None else f"{repo_id}@{revision}"
            hint = "" if given is not None else " It is the base that REPO names: pass --base DIR, or --base none."
            try:
                base = base_weights(api=api, repo_id=repo_id, revision=revision)
            except HubError as error:
                raise HubError(f"{error}{hint}") from error
            if not base:
                raise HubError(f"{repo_id} holds no weights: name the model that was unlearned.{hint}")
    return Audit(history, base, name, _find(history, base))


def _find(history: History, base: list[BaseFile]) -> list[Served]:
    return find_original(history, base, released_hashes(history, base))


def _split(text: str) -> tuple[str, str | None]:
    repo_id, _, revision = text.partition("@")
    return repo_id, revision or None


def _is_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _check_id(text: str) -> None:
    if not _is_id(_split(text)[0]):
        raise UsageError("--base is neither a folder nor the id of a model: pass DIR, ID or ID@REV.")


def _is_confirmed(args: argparse.Namespace) -> bool:
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise UsageError("Nothing was removed: add --yes to remove what the plan names, for good.")
    print("Remove this for good? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def cannot_see(history: History) -> Iterator[str]:
    """What this audit could not look at."""
    if history.large is None:
        yield "large files that no branch, tag or pull request reaches: this token may not list them"
    yield from CANNOT_SEE


def _print(args: argparse.Namespace, audit: Audit, plan: PurgePlan | None, file: Any = None) -> None:
    file = file or sys.stdout
    if args.json and plan is None:
        return
    if not args.quiet:
        print(as_text(audit), file=file)
    elif not args.json:
        for finding in history_findings(audit.history.repo_id, audit.found):
            print(f"{finding.rule} {finding.file}", file=file)
    if plan is not None and not (args.quiet and args.yes):
        left = {one.rule for one in audit.found} - {ORIGINAL} if not args.all else set()
        print("\n" + as_plan(plan, left), file=sys.stderr if args.quiet else file)


def as_text(audit: Audit) -> str:
    """A table of what is served by which ref, and what an audit cannot see."""
    history = audit.history
    counts = {kind: sum(ref.kind == kind for ref in history.refs) for kind in ("branch", "tag", "pull request")}
    refs = ", ".join(_count(number, kind) for kind, number in counts.items() if number)
    large = "" if history.large is None else f", {_count(len(history.large), 'large file')}"
    lines = [f"{history.repo_id}: {refs}; {_count(len(history.commits), 'commit')}{large}."]
    if audit.base_name is None:
        lines.append("No base is known, so the original was not looked for by its hash: pass --base DIR or --base ID.")
    else:
        lines.append(f"Looked for {_count(len(audit.base), 'weight file')} of {audit.base_name}.")
    lines.append("")
    if audit.found:
        lines += [*_aligned([("what", "ref", "where", "since", "files"), *_rows(audit.found)]), ""]
        count = len({one.sha256 or one.oid for one in audit.found if one.rule == ORIGINAL})
        unknown = len({one.sha256 or one.oid for one in audit.found if one.rule == UNKNOWN})
        if count:
            lines.append(
                f"{_count(count, 'weight file')} of the original {'are' if count > 1 else 'is'} still served."
            )
        if unknown:
            lines.append(
                f"{_count(unknown, 'weight file')} that no report lists: may be the original, saved in another way."
            )
    elif audit.base_name is None:
        lines.append("All weights are listed by a report that lies beside them.")
    else:
        lines.append("Nothing of the original is served.")
    lines += ["Not seen by an audit:", *(f"  {what}" for what in cannot_see(history))]
    return "\n".join(lines)


def _rows(found: list[Served]) -> Iterator[tuple[str, ...]]:
    """One row for each kind of finding and ref."""
    groups: dict[tuple[str, str], list[tuple[Served, ServedBy | None]]] = {}
    for one in found:
        for by in one.refs or (None,):
            label = "no ref" if by is None else by.name if by.kind == "branch" else f"{by.kind} {by.name}"
            groups.setdefault((one.rule, label), []).append((one, by))
    for (rule, label), entries in groups.items():
        names = list(dict.fromkeys(name for one, _ in entries for name in one.names))
        files = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
        # What is nearest to the tip is what people get first
        nearest = min((by for _, by in entries if by is not None), key=lambda by: by.behind, default=None)
        if nearest is None:
            place = "the storage alone"
        else:
            behind = "its tip" if nearest.behind == 0 else f"{_count(nearest.behind, 'commit')} behind"
            place = f"{behind} ({nearest.commit[:8]})"
        yield _WHAT[rule], label, place, min(one.since for one, _ in entries)[:10], files


def as_plan(plan: PurgePlan, left: set[str]) -> str:
    """What is going to be removed, and what is not."""
    lines = []
    if plan.tags:
        lines.append(f"  delete {_named('tag', plan.tags)}; where its tip is clean, tag main again afterwards")
    if plan.branches:
        lines.append(f"  delete {_named('branch', plan.branches)}")
    if plan.removed_from_main:
        lines.append(f"  remove {_count(len(plan.removed_from_main), 'file')} from main by a commit")
    if plan.squashed:
        lines.append(f"  make one commit of the history of {', '.join(plan.squashed)}, which keeps its files")
    if plan.large:
        lines.append(f"  delete {_count(len(plan.large), 'large file')} for good, in all commits")
    lines = ["To be removed:", *lines] if lines else ["There is nothing that can be removed."]
    if plan.stays:
        lines.append(f"Cannot be removed: {', '.join(plan.stays)}, which the Hub lets nobody delete.")
    if left:
        lines.append(f"Not in this plan: {' and '.join(sorted(_WHAT[rule] for rule in left))} (add --all).")
    return "\n".join(lines)


def as_result(result: PurgeResult, audit: Audit) -> str:
    """What a purge left, as the history says that was read again."""
    lines = []
    if not result.main_kept:
        lines.append("main does not hold what it held before: somebody wrote to it meanwhile, so compare the two.")
    if result.remaining:
        lines += ["Still served:", *_aligned([("what", "ref", "where", "since", "files"), *_rows(result.remaining)])]
        requests = {by.name for one in result.remaining for by in one.refs if by.kind == "pull request"}
        if requests:
            lines.append(
                f"The Hub lets nobody delete a pull request ({', '.join(sorted(requests))}): ask its support, or move "
                "to a new repository and delete this one."
            )
        else:
            lines.append("Run the audit again, and purge what it finds.")
    else:
        lines.append("Removed, as a second look at the history shows.")
    if result.plan.squashed:
        lines.append("Commits that no ref reaches any more are served by their number until the Hub collects them.")
    others = [one for one in audit.found if one not in result.remaining]
    if others:
        lines.append(f"Apart from that, {_count(len(others), 'finding')} of other kinds: run the audit again.")
    return "\n".join(lines)


def _named(kind: str, names: tuple[str, ...]) -> str:
    plural = {"tag": "tags", "branch": "branches"}[kind]
    return f"{kind if len(names) == 1 else plural} {', '.join(names)}"


def _count(number: int, what: str) -> str:
    plural = "branches" if what == "branch" else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@contextmanager
def _progress(title: str, is_quiet: bool, unit: str = " commits") -> Iterator[Callable[[int, int | None], None]]:
    """Counts on stderr: done of how many, or more of an unknown number."""
    with tqdm(desc=title, unit=unit, unit_scale=unit == "B", file=sys.stderr, disable=is_quiet, leave=False) as bar:

        def update(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done if total is None else done - bar.n)

        yield update


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
