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
"""What the commands that talk to the Hub share: the token, and the client."""

import argparse
import sys

from huggingface_hub import HfApi

from hf_unlearn.cards.remote import connect

from . import UsageError


def add_token_argument(parser: argparse.ArgumentParser) -> None:
    """`--token`, which is better set as HF_TOKEN."""
    parser.add_argument("--token", metavar="TOKEN", help="Rather `hf auth login` or HF_TOKEN: others see a command.")


def connect_with(args: argparse.Namespace, *, required: bool) -> HfApi:
    """
    The client with the token of the command line, of which it warns, or else the usual one. Nothing is sent.

    Raises:
        `UsageError`: there is no token, and one is required.
    """
    if args.token is not None:
        print(
            "Warning: others on this machine can see a token on the command line: set HF_TOKEN instead.",
            file=sys.stderr,
        )
    try:
        return connect(args.token, required=required)
    except ValueError as error:
        raise UsageError(str(error)) from error
