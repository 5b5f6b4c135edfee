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
Make the new model out of its base and an edit manifest, bit for bit.

```bash
hf-unlearn apply BASE MANIFEST_FOLDER OUT
hf-unlearn apply BASE MANIFEST_FOLDER OUT --verify_signature ALLOWED_SIGNERS --identity someone@example.org
```
"""

import json
import os

from hf_unlearn.cards.rebuild import apply_manifest

from . import UsageError
from .diff import Parser, open_folder, progress_bar


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn apply",
        description="Make the new model out of its base and an edit manifest, bit for bit.",
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="Folder of the model that the manifest was made from.")
    parser.add_argument("manifest", metavar="MANIFEST_FOLDER", help="What `hf-unlearn diff --manifest` wrote.")
    parser.add_argument("out", metavar="OUT", help="Folder of the new model; must not exist.")
    parser.add_argument(
        "--verify_signature",
        "--verify-signature",
        metavar="ALLOWED_SIGNERS",
        help="Who may sign with which key, as `man ssh-keygen` describes under ALLOWED SIGNERS.",
    )
    parser.add_argument("--identity", metavar="NAME", help="Who has to have signed, a name in ALLOWED_SIGNERS.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON.")
    parser.add_argument("-q", "--quiet", action="store_true", help="No progress bar.")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if (args.verify_signature is None) != (args.identity is None):
        raise UsageError("A signature needs both: --verify_signature ALLOWED_SIGNERS and --identity NAME.")
    if not os.path.isdir(args.manifest):
        raise UsageError("MANIFEST_FOLDER is not a folder: pass the one that `hf-unlearn diff --manifest` wrote.")
    if os.path.lexists(args.out):
        raise UsageError("OUT exists already: name a new folder.")
    with open_folder(args.base, "BASE") as base, progress_bar("Applying", 2 * base.size, args.quiet) as progress:
        author = apply_manifest(
            base,
            args.manifest,
            args.out,
            allowed_signers=args.verify_signature,
            identity=args.identity,
            progress=progress,
        )
    if args.json:
        print(json.dumps({"out": args.out, "author": author if args.identity else None, "verified": True}, indent=2))
    else:
        print(f"{args.out}: every tensor and file has the hash that the manifest names ({author}).")
    return 0
