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
Check a folder before it is released: files, weights, card, secrets, paths, and every text of the forget set.

```bash
hf-unlearn check out --base BASE --forget forget.jsonl --repo_id org/name --message "Forget some people"
hf-unlearn check out --base BASE --forget forget.jsonl --allow forget-entity:README.md:0fbe4a18
```

Exit code 0 where nothing blocks, 1 where something does, 2 where the folders cannot be read. No match is repeated.
"""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from tqdm import tqdm

from hf_unlearn.cards.check import Allowance, CheckResult, check_release

from . import UsageError, run
from .diff import Parser, open_folder


_NAMES = {
    "repo_id": "the repository's name",
    "message": "the commit message",
    "tag": "the tag",
    "branch": "the branch",
}


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn check",
        description="Check a folder before it is released. Exit code 1 where something blocks.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="The folder that is to be released.")
    add_gate_arguments(parser)
    for name, words in _NAMES.items():
        option = [f"--{name}", *([f"--{name.replace('_', '-')}"] if "_" in name else [])]
        parser.add_argument(*option, metavar="TEXT", help=f"Checked as well: {words}.")
    parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Print rule and file of what blocks, and no more.")
    return parser


def add_gate_arguments(parser: Parser) -> None:
    """What the rules compare with and what they let through: of `check` and of `push`."""
    parser.add_argument("--base", metavar="BASE", help="Folder of the base model.")
    parser.add_argument(
        "--forget",
        "--forget_dataset",
        metavar="F",
        help="The forget set, which must not leave: a Hub id, a folder saved by datasets, or a file.",
    )
    parser.add_argument("--forget_config", "--forget-config", metavar="NAME", help="Configuration of a Hub data set.")
    parser.add_argument("--forget_split", "--forget-split", metavar="NAME", default="train", help="Its split.")
    parser.add_argument("--entities", metavar="FILE", help="Further names that must not leave, one per line.")
    parser.add_argument(
        "--allow",
        metavar="RULE[:FILE[:HASH]]",
        action="append",
        default=[],
        help="Let findings through by name; may be given several times.",
    )
    parser.add_argument(
        "--acknowledge_licence",
        "--acknowledge-licence",
        action="store_true",
        help="The base is known to have no licence, or the release names one of its own.",
    )


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    result = check(args)
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
    elif args.quiet:
        for finding in result.blocking:
            print(f"{finding.rule} {finding.file}")
    else:
        print(as_text(result))
    return 0 if result.passed else 1


def check(args: argparse.Namespace) -> CheckResult:
    """
    Everything that the command does but printing.

    Raises:
        `UsageError`: a folder or the forget set cannot be read.
    """
    options = gate_options(args)
    names = {_NAMES[name]: vars(args)[name] for name in _NAMES if vars(args)[name] is not None}
    with reading_weights(args) as bar:
        return check_release(args.folder, names=names, progress=bar.update, **options)


def gate_options(args: argparse.Namespace) -> dict[str, Any]:
    """
    The keyword arguments of [`~hf_unlearn.cards.check.check_release`] that `add_gate_arguments` asks for.

    Raises:
        `UsageError`: the folder or the base are none, or the forget set cannot be read.
    """
    if not os.path.isdir(args.folder):
        raise UsageError("DIR is not a folder: name the folder that is to be released.")
    if args.base is not None and not os.path.isdir(args.base):
        with open_folder(args.base, "--base"):  # which says what to do
            pass
    try:
        allowances = [Allowance.parse(text) for text in args.allow]
    except ValueError as error:
        raise UsageError(str(error)) from error
    return {
        "base": args.base,
        "rows": None if args.forget is None else read_forget_set(args),
        "entities": _read_entities(args.entities),
        "token_decoder": _token_decoder(args.folder),
        "allowances": allowances,
        "licence_acknowledged": args.acknowledge_licence,
    }


@contextmanager
def reading_weights(args: argparse.Namespace) -> Iterator[tqdm]:
    """
    A progress bar over the bytes of the weights of both folders.

    Raises:
        `UsageError`: a folder cannot be read, or they are of two architectures.
    """
    try:
        size = sum(
            entry.stat().st_size
            for folder in (args.folder, args.base)
            if folder is not None
            for entry in os.scandir(folder)
            if entry.name.endswith(".safetensors") and entry.is_file()
        )
        with tqdm(
            total=size,
            desc="Checking the weights",
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            disable=args.quiet,
            leave=False,
        ) as bar:
            yield bar
    except OSError as error:
        if error.errno is None:
            raise
        raise UsageError(f"A folder cannot be read ({os.strerror(error.errno)}): check DIR and --base.") from error
    except ValueError as error:
        raise UsageError(str(error)) from error


def read_forget_set(args: argparse.Namespace) -> Iterable[Mapping[str, Any]]:
    """
    The rows of `--forget`. What `datasets` draws while it reads is not shown under `--quiet`.

    Raises:
        `UsageError`: there is no such data set.
    """
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    from .rows import load_rows

    was_disabled = are_progress_bars_disabled()
    if args.quiet:
        disable_progress_bars()
    try:
        return load_rows(args.forget, args.forget_config, args.forget_split, "forget").with_format(None)
    finally:
        if not was_disabled:
            enable_progress_bars()


def _read_entities(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            return [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--entities cannot be read ({type(error).__name__}): name a text file.") from error


def _token_decoder(folder: str) -> Callable[[list[int]], str] | None:
    """`decode` of the release's tokenizer, which needs neither torch nor transformers."""
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path) or os.path.islink(path) or find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
    except Exception:  # its own type; that the file is broken is for the checks to say
        return None
    size = tokenizer.get_vocab_size()
    return lambda ids: tokenizer.decode([token for token in ids if 0 <= token < size])


def as_text(result: CheckResult) -> str:
    """What blocks, by file, what was let through, and the outcome."""
    lines = []
    for title, findings in (("Blocked", result.blocking), ("Let through", result.allowed)):
        if not findings:
            continue
        lines.append(f"{title}:")
        for finding in sorted(findings, key=lambda finding: (finding.file, finding.rule)):
            named = f"  [{finding.match_sha256[:8]}]" if finding.match_sha256 else ""
            lines.append(f"  {finding.file}: {finding.rule}{named}")
            lines += textwrap.wrap(finding.message, 100, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    count = len(result.blocking)
    if result.passed:
        lines.append(f"Passed: {len(result.files)} files may leave.")
    else:
        lines.append(f"{count} finding{'s' if count > 1 else ''}: nothing may leave.")
        # Of what a repository still serves, the findings say what to do instead
        first = next((finding for finding in result.blocking if not finding.rule.startswith("history-")), None)
        if first is not None:
            match = f":{first.match_sha256[:8]}" if first.match_sha256 else ""
            lines[-1] += " To let one through, name it:"
            lines.append(f"  --allow '{first.rule}:{first.file}{match}'")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
