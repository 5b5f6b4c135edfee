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
See whether a release on the Hub is what its report, and a receipt of its push, say it is. Nothing is written there.

```bash
hf-unlearn verify org/name
hf-unlearn verify org/name@v1 --receipt receipt.json
hf-unlearn verify org/name --download                 # hash the bytes, not what the Hub lists
```

A public repository takes no token. Exit code 0 where all agrees, 1 where something does not or the Hub cannot be
asked, 2 where the command was not understood.
"""

import argparse
import json
import os
import re
import sys
import textwrap

from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from hf_unlearn.cards.history import base_weights
from hf_unlearn.cards.remote import check_repo_id
from hf_unlearn.cards.stored import BaseFile, is_weights
from hf_unlearn.cards.verify import ReceiptContent, VerifyResult, is_vouched_for, verify_release

from . import UsageError, run
from .diff import Parser
from .hub import add_token_argument, connect_with


_MAX_RECEIPT = 32 * 2**20


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn verify",
        description="See whether a release on the Hub is what its report says. Exit code 1 where it is not.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "repo", metavar="REPO[@REV]", help="The repository, and a branch, tag, refs/pr/N or commit (default: main)."
    )
    parser.add_argument("--receipt", metavar="FILE", help="The receipt of the push, to compare every file with.")
    parser.add_argument(
        "--base",
        metavar="DIR|ID[@REV]",
        help="The base, whose changed weights must not be there (default: the model that the report names).",
    )
    parser.add_argument(
        "--download", action="store_true", help="Download large files too, one at a time, and hash their bytes."
    )
    parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="Print rule and file of what is wrong, and no more."
    )
    add_token_argument(parser)
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    result = verify(args)
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
    elif args.quiet:
        for finding in result.findings:
            print(f"{finding.rule} {finding.file}")
    else:
        print(as_text(result))
    return 0 if result.passed else 1


def verify(args: argparse.Namespace) -> VerifyResult:
    """
    Everything that the command does but printing.

    Raises:
        `UsageError`: an argument is not what it has to be. Nothing was sent then.
        [`~hf_unlearn.cards.remote.HubError`]: the Hub cannot be asked, or has no such repository or revision.
    """
    repo_id, revision = _parse_repo(args.repo)
    receipt = None if args.receipt is None else _read_receipt(args.receipt)
    if args.base is not None and not os.path.isdir(args.base):
        _parse_repo(args.base)  # before anything is sent
    api = connect_with(args, required=False)
    were_disabled = are_progress_bars_disabled()
    # Those of the client are worth seeing for large files only
    if args.quiet or not args.download:
        disable_progress_bars()
    try:
        base = None if args.base is None else _read_base(api, args.base)
        with tqdm(desc=f"Verifying {repo_id}", unit=" files", file=sys.stderr, disable=args.quiet, leave=False) as bar:
            return verify_release(
                api,
                repo_id,
                revision,
                receipt=receipt,
                base=base,
                download=args.download,
                progress=bar.update,
            )
    finally:
        if not were_disabled:
            enable_progress_bars()


def _parse_repo(text: str) -> tuple[str, str | None]:
    repo_id, separator, revision = text.partition("@")
    try:
        check_repo_id(repo_id)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if separator and (not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*", revision) or ".." in revision):
        raise UsageError(
            "A revision is a branch, a tag, refs/pr/N or a commit, with letters, digits and '._/+-' only."
        )
    return repo_id, revision or None


def _read_receipt(path: str) -> ReceiptContent:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_RECEIPT + 1)
    except OSError as error:
        raise UsageError(
            f"--receipt cannot be read ({os.strerror(error.errno)}): name the file of the push."
        ) from error
    if len(content) > _MAX_RECEIPT:
        raise UsageError("--receipt is larger than a receipt can be: name the file that `hf-unlearn push` wrote.")
    try:
        return ReceiptContent.from_json(content)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _read_base(api: HfApi, base: str) -> list[BaseFile]:
    if not os.path.isdir(base):
        repo_id, revision = _parse_repo(base)
        return base_weights(api=api, repo_id=repo_id, revision=revision, also=is_vouched_for)
    try:
        files = base_weights(base, also=is_vouched_for)
    except ValueError as error:
        raise UsageError("--base is a folder that cannot be read: pass that of a model.") from error
    if not any(is_weights(file.path) for file in files):
        raise UsageError("--base is a folder without weights: pass that of the base model.")
    return files


def as_text(result: VerifyResult) -> str:
    """What is wrong, by file, what was looked at and what was not, and the outcome."""
    lines = [f"{result.repo_id}@{result.revision} is commit {result.commit[:12]}.", ""]
    if result.findings:
        lines.append("Not as it should be:")
        for finding in sorted(result.findings, key=lambda finding: (finding.file, finding.rule)):
            lines.append(f"  {finding.file}: {finding.rule}")
            lines += textwrap.wrap(finding.message, 100, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    if result.not_checked:
        lines.append("Not checked:")
        for sentence in result.not_checked:
            lines += textwrap.wrap(sentence, 100, initial_indent="  ", subsequent_indent="  ")
        lines.append("")
    lines.append(f"Checked: {', '.join(result.checks)}.")
    if result.passed:
        types = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(result.dtypes.items()))
        lines.append(f"Verified: {len(result.files)} files are those of the release; parameters: {types}.")
    else:
        count = len(result.findings)
        lines.append(f"{count} finding{'s' if count > 1 else ''}: this is not the release that it says it is.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
