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
Check a folder and send it to the Hub as one commit, to a repository that serves nothing of the original.

```bash
hf-unlearn push out org/name --base BASE --forget forget.jsonl --dry-run
hf-unlearn push out org/name --base BASE --forget forget.jsonl --receipt receipt.json
```

A new repository is private. Exit code 0 where the release is there, 1 where something stands in its way or the Hub
failed, 2 where the arguments do not fit. Where it is not 0, main is as it was, unless the message says otherwise.
"""

import argparse
import json
import os
import sys

from hf_unlearn.cards.check import Allowance
from hf_unlearn.cards.disclosure import LEVELS
from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.manifest import EDIT_NAME
from hf_unlearn.cards.push import push_release
from hf_unlearn.cards.receipt import MESSAGE, Blocked, PushOptions, Receipt
from hf_unlearn.cards.remote import check_repo_id
from hf_unlearn.cards.report import write_text
from hf_unlearn.cards.tensor_files import ADAPTER_NAME

from . import UsageError, run
from .check import add_gate_arguments, as_text, gate_options, reading_weights
from .diff import Parser
from .hub import add_token_argument, connect_with


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn push",
        description="Check a folder and send it to the Hub as one commit. A new repository is private.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="The folder that is to be released.")
    parser.add_argument("repo_id", metavar="REPO", help="OWNER/NAME; created where it does not exist.")
    add_gate_arguments(parser)
    parser.add_argument(
        "--allow_reversible",
        "--allow-reversible",
        action="store_true",
        help="Send an adapter alone, without which all is back; the card has to say so.",
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Say what would be sent, and send nothing."
    )
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private", action="store_true", help="Refuse a repository that is public, as without --public (default)."
    )
    visibility.add_argument(
        "--public", action="store_true", help="All may see the release; a new repository is made public at the end."
    )
    parser.add_argument(
        "--pr", "--create_pr", "--create-pr", action="store_true", help="Open a pull request; main stays as it is."
    )
    parser.add_argument(
        "--card_mode",
        "--card-mode",
        choices=("merge", "new", "keep", "pr"),
        default="merge",
        help="What becomes of the card there: keep what a person wrote (default), replace it, leave it, or leave it "
        "and propose the new one.",
    )
    parser.add_argument(
        "--repair_card", "--repair-card", action="store_true", help="Drop what is at fault in the metadata there."
    )
    parser.add_argument(
        "--disclosure",
        choices=LEVELS,
        help="Render card and report anew at this level; DIR stays as it is. By default they leave as they are.",
    )
    parser.add_argument(
        "--message", "--commit_message", "--commit-message", metavar="TEXT", default=MESSAGE, help="Of the commit."
    )
    parser.add_argument("--tag", metavar="NAME", help="Of the release; a hash over its files where unset.")
    parser.add_argument("--receipt", metavar="FILE", help="Write what was done as JSON; outside DIR.")
    add_token_argument(parser)
    parser.add_argument("--json", action="store_true", help="Print the receipt, or what blocks, as JSON.")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="Print the commit, or rule and file of what blocks."
    )
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    try:
        receipt = push(args)
    except Blocked as blocked:
        if args.json:
            print(json.dumps(blocked.result.to_dict(), indent=2))
        elif args.quiet:
            for finding in blocked.result.blocking:
                print(f"{finding.rule} {finding.file}")
        else:
            print(as_text(blocked.result))
        return 1
    text = json.dumps(receipt.to_dict(), indent=2)
    failure = None
    if args.receipt is not None:
        try:
            write_text(args.receipt, text + "\n")
        except OSError as error:
            failure = os.strerror(error.errno)
    if args.json or failure:
        print(text)
    elif args.quiet:
        print(receipt.commit or "")
    else:
        print(as_lines(receipt))
    if failure:
        raise OSError(f"The push is done, but its receipt cannot be written ({failure}): it is printed instead.")
    return 0


def push(args: argparse.Namespace) -> Receipt:
    """
    Everything that the command does but printing and the receipt's file.

    Raises:
        `UsageError`: an argument does not fit.
        [`~hf_unlearn.cards.receipt.Blocked`]: a rule is in the way.
        [`~hf_unlearn.cards.remote.HubError`]: the Hub refuses or fails.
    """
    _check_receipt(args)
    options = PushOptions(
        public=args.public,
        pull_request=args.pr,
        card_mode=args.card_mode,
        repair_card=args.repair_card,
        disclosure=args.disclosure,
        message=args.message,
        tag=args.tag,
        dry_run=args.dry_run,
    )
    try:
        # What is known at once, before data and weights are read
        check_repo_id(args.repo_id)
    except ValueError as error:
        raise UsageError(str(error)) from error
    connect_with(args, required=not args.dry_run)
    gate = gate_options(args)
    if args.allow_reversible:
        gate["allowances"].append(Allowance("reversible"))
    with reading_weights(args) as bar:

        def say(text: str) -> None:
            bar.close()  # the weights are read by now
            if not args.quiet:
                print(text, file=sys.stderr)

        return push_release(
            args.folder, args.repo_id, token=args.token, options=options, progress=bar.update, say=say, **gate
        )


def _check_receipt(args: argparse.Namespace) -> None:
    """Before anything is sent: a receipt that cannot be written is known too late otherwise."""
    if args.receipt is None:
        return
    path = os.path.realpath(args.receipt)
    if not os.path.isdir(os.path.dirname(path)) or os.path.isdir(path):
        raise UsageError("--receipt names no file in a folder that is there.")
    if os.path.commonpath([path, os.path.realpath(args.folder)]) == os.path.realpath(args.folder):
        raise UsageError("--receipt lies in DIR, with which it would leave: name a file outside.")


def as_lines(receipt: Receipt) -> str:
    """What a person wants to know: where it is, what was sent, and how to load and verify it."""
    size = sum(file.size for file in receipt.files)
    seen = {True: "private", False: "public", None: "not looked at"}[receipt.private]
    where = "" if receipt.commit is None else f"{receipt.commit[:12]} on {receipt.revision}"
    lines = []
    if receipt.dry_run:
        if receipt.private is None and "history" not in receipt.checks:
            seen = "new, private" if receipt.sent else seen
        lines.append(f"Nothing was sent. {receipt.repo_id} ({seen}) would get:")
        lines += [f"  {'+' if path in receipt.sent else '='} {path}" for path in (file.path for file in receipt.files)]
        lines += [f"  - {path}" for path in receipt.deleted]
        lines.append(f"{len(receipt.files)} files, {_bytes(size)}; + sent, = there already, - removed there")
    else:
        lines.append(f"Released in {receipt.repo_id} ({seen})")
        lines.append(f"  commit   {where}" + (f", tag {receipt.tag}" if receipt.tag else ""))
        lines.append(
            f"  files    {len(receipt.files)}, {_bytes(size)}: {len(receipt.sent)} sent, "
            f"{len(receipt.unchanged)} there already, {len(receipt.deleted)} removed"
        )
        if receipt.card_pull_request is not None:
            lines.append(f"  card     proposed in {receipt.card_pull_request}")
    lines.append(f"  checked  {', '.join(receipt.checks)}")
    if receipt.allowed:
        rules = ", ".join(dict.fromkeys(finding.rule for finding in receipt.allowed))
        lines.append(f"  allowed  {rules}")
    if not receipt.dry_run:
        revision = receipt.tag or receipt.revision
        lines.append(f"  load     {_loading(receipt, revision)}")
        lines.append(f"  verify   hf-unlearn verify {receipt.repo_id}@{revision}")
    return "\n".join(lines)


def _loading(receipt: Receipt, revision: str) -> str:
    """What loads the release, by the kind of its weights."""
    weights = {file.path for file in receipt.files if kind_of(file.path) == "weights"}
    if weights == {EDIT_NAME}:
        return f'hf-unlearn apply BASE "$(hf download {receipt.repo_id} --revision {revision})" OUT'
    # transformers asks the base of an adapter for the revision of the adapter as well, PEFT does not
    loader = "AutoPeftModelForCausalLM" if ADAPTER_NAME in weights else "AutoModelForCausalLM"
    return f'{loader}.from_pretrained("{receipt.repo_id}", revision="{revision}")'


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
