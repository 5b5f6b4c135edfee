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
Write the model card of a release from its report.

```bash
hf-unlearn card build out --disclosure count-only
```

The card, the report at its disclosure level and the pictures are written into the folder.
"""

import argparse
import json
import os
import sys
from typing import Any

from hf_unlearn.cards.assemble import copy_licence, measure_footprint
from hf_unlearn.cards.builder import build_card
from hf_unlearn.cards.disclosure import LEVELS

from . import UsageError, run
from .check import read_forget_set
from .diff import Parser


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn card", description="Write the model card of a release from its report.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    build = commands.add_parser(
        "build", help="write README.md, the pictures and the report", allow_abbrev=False, prog="hf-unlearn card build"
    )
    build.add_argument("folder", metavar="DIR", help="The release, with unlearning_report.json.")
    build.add_argument(
        "--disclosure",
        choices=LEVELS,
        help="How much is said of the data; the report's own level where unset. What the report loses is gone.",
    )
    build.add_argument(
        "--forget", metavar="F", help="For sealed: the forget set that is committed to (a file, folder or Hub id)."
    )
    build.add_argument("--forget_config", "--forget-config", metavar="NAME", help="Configuration of a Hub data set.")
    build.add_argument("--forget_split", "--forget-split", metavar="NAME", default="train", help="Its split.")
    build.add_argument(
        "--salt", metavar="FILE", help="For sealed: where the secret salt is written, outside DIR; keep it."
    )
    build.add_argument("--model_name", "--model-name", metavar="NAME", help="With it, the metadata holds the numbers.")
    build.add_argument(
        "--base",
        metavar="BASE",
        help="Folder of the base model: its licence is taken over, and how far the weights moved is measured where "
        "the report does not say.",
    )
    build.add_argument("--license", metavar="ID", help="Identifier of the base's licence, where its card names none.")
    build.add_argument(
        "--card_mode",
        "--card-mode",
        choices=("merge", "new", "keep"),
        default="merge",
        help="What becomes of a README.md that is there: keep what a person wrote (default), replace it, or leave it.",
    )
    build.add_argument(
        "--repair_card", "--repair-card", action="store_true", help="Drop what is at fault in its metadata."
    )
    build.add_argument("--json", action="store_true", help="Print the files written as JSON.")
    build.add_argument("-q", "--quiet", action="store_true", help="Print nothing but errors.")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    files = build(args)
    if args.json:
        print(json.dumps({"folder": args.folder, "files": files}, indent=2))
    elif not args.quiet:
        print("\n".join([f"In {args.folder}:", *(f"  {name}" for name in files)]))
    return 0


def build(args: argparse.Namespace) -> list[str]:
    """
    Everything that the command does but printing.

    Raises:
        `UsageError`: the report is missing or does not fit the level.
    """
    if not os.path.isdir(args.folder):
        raise UsageError("DIR is not a folder: name the folder of a release, with its unlearning_report.json.")
    commitment = commitment_of(args)
    licence = args.license if args.base is None else _inherit(args)
    try:
        if args.base is not None:
            measure_footprint(args.folder, args.base)
        return build_card(
            args.folder,
            disclosure=args.disclosure,
            commitment=commitment,
            model_name=args.model_name,
            license=licence,
            mode=args.card_mode,
            repair=args.repair_card,
        )
    except ValueError as error:
        if commitment is not None:
            os.unlink(args.salt)  # drawn just now, and for nothing: the next try draws its own
        raise UsageError(str(error)) from error


def _inherit(args: argparse.Namespace) -> dict[str, Any]:
    """Copies the licence files of the base, byte for byte, and gives what its card names."""
    if not os.path.isdir(args.base):
        raise UsageError("--base is not a folder: name the folder of the base model, such as a snapshot of the Hub.")
    try:
        inherited = copy_licence(args.base, args.folder, license=args.license)
    except ValueError as error:
        raise UsageError(str(error).replace("license is not", "--license is not")) from error
    for finding in inherited.findings:
        print(f"Licence: {finding.message}", file=sys.stderr)
    return inherited.metadata


def commitment_of(args: argparse.Namespace) -> str | None:
    """
    What `--disclosure sealed` commits to; writes the salt.

    Raises:
        `UsageError`: `--forget` and `--salt` are not given with it, or given without.
    """
    is_sealed = args.disclosure == "sealed"
    if any((given is not None) != is_sealed for given in (args.forget, args.salt)):
        raise UsageError(
            "--disclosure sealed commits to the forget set: give --forget and --salt with it, and with no other level."
        )
    if not is_sealed:
        return None
    from hf_unlearn.cards.disclosure import commit_rows, new_salt

    rows = read_forget_set(args)
    try:
        return commit_rows(rows, new_salt(args.salt, args.folder))
    except ValueError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        reason = os.strerror(error.errno)
        raise UsageError(f"The salt cannot be written ({reason}): name a file in a folder that is there.") from error


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
