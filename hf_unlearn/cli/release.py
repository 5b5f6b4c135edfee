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
Put a release together from the folder that a trainer saved: only what may leave, and everything that the base has.

```bash
hf-unlearn release out release --base BASE
hf-unlearn check release --base BASE --forget forget.jsonl
```

An adapter is merged and compared with base and adapter before there is a release; full weights need no torch.
"""

import argparse
import json
import os
import sys

from hf_unlearn.cards.assemble import assemble_files
from hf_unlearn.cards.disclosure import LEVELS
from hf_unlearn.cards.tensor_files import open_model

from . import UsageError, run
from .card import commitment_of
from .diff import Parser, progress_bar


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn release",
        description="Put a release together from the folder that a trainer saved.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", metavar="DIR", help="What the trainer saved, with unlearning_report.json.")
    parser.add_argument("output", metavar="OUT", help="The release: a folder that is new or empty.")
    parser.add_argument("--base", metavar="BASE", required=True, help="Folder of the base model.")
    parser.add_argument(
        "--adapter",
        choices=("merge", "keep"),
        default="merge",
        help="What becomes of an adapter: merge it into the base (default), or keep it, which is reversible.",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="How merged weights are stored: as the base's where rounding keeps the edit, else float32 (default).",
    )
    parser.add_argument(
        "--disclosure",
        choices=LEVELS,
        help="How much is said of the data; the report's own level where unset.",
    )
    parser.add_argument(
        "--forget", metavar="F", help="For sealed: the forget set that is committed to (a file, folder or Hub id)."
    )
    parser.add_argument("--forget_config", "--forget-config", metavar="NAME", help="Configuration of a Hub data set.")
    parser.add_argument("--forget_split", "--forget-split", metavar="NAME", default="train", help="Its split.")
    parser.add_argument(
        "--salt", metavar="FILE", help="For sealed: where the secret salt is written, outside OUT; keep it."
    )
    parser.add_argument(
        "--model_name", "--model-name", metavar="NAME", help="With it, the metadata holds the numbers."
    )
    parser.add_argument("--license", metavar="ID", help="Identifier of the base's licence, where its card names none.")
    parser.add_argument("--json", action="store_true", help="Print the files, and what merging cost, as JSON.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Print nothing but errors.")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    result = release(args)
    if args.json:
        print(json.dumps(result, indent=2))
    elif not args.quiet:
        print("\n".join([f"In {args.output}:", *(f"  {name}" for name in result["files"])]))
        if result["merge"] is not None:
            print(
                f"Merged in {result['merge']['dtype']}: the logits are off by {result['merge']['error']:.1e} of their "
                f"size, {result['merge']['lost']:.2%} of what the adapter does."
            )
        print(f"Next: hf-unlearn check {args.output} --base {args.base} --forget FORGET")
    return 0


def release(args: argparse.Namespace) -> dict:
    """
    Everything that the command does but printing.

    Raises:
        `UsageError`: the folders do not fit.
    """
    for path, name in ((args.folder, "DIR"), (args.base, "--base")):
        if not os.path.isdir(path):
            raise UsageError(f"{name} is not a folder: name one that is here; `hf download` fetches a base.")
    try:
        with open_model(args.folder) as model:
            is_adapter, size = model.kind == "adapter", model.size
    except ValueError as error:
        raise UsageError(f"DIR cannot be read: {error}.") from error
    if args.dtype != "auto" and not (is_adapter and args.adapter == "merge"):
        raise UsageError("--dtype is about merging an adapter: leave it out, weights are released as they are.")
    commitment = commitment_of(args)
    options = {
        "base": args.base,
        "adapter": args.adapter,
        "disclosure": args.disclosure,
        "commitment": commitment,
        "model_name": args.model_name,
        "license": args.license,
    }
    try:
        if is_adapter and args.adapter == "merge":
            from dataclasses import asdict

            from hf_unlearn.releasing import assemble_release

            assembled = assemble_release(args.folder, args.output, dtype=args.dtype, quiet=args.quiet, **options)
            return {"folder": args.output, "files": assembled.files, "merge": asdict(assembled.merge)}
        with progress_bar("Copying", size, args.quiet) as progress:
            files = assemble_files(args.folder, args.output, progress=progress, **options)
        return {"folder": args.output, "files": files, "merge": None}
    except ValueError as error:
        if commitment is not None:
            os.unlink(args.salt)  # drawn just now, and for nothing: the next try draws its own
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
