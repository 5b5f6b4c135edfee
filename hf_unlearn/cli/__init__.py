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
The command line: `hf-unlearn COMMAND ...`, one file per command.

Only the chosen command's file is imported, and heavy imports stay inside functions. Results go to stdout, all else to
stderr. Exit codes: 0 done, 1 failed, 2 the command was not understood or its inputs do not fit.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable

from hf_unlearn._version import __version__


COMMANDS = {
    "apply": "make a model from its base and an edit manifest, bit for bit",
    "attack": "try to bring back what a model forgot, and compare with a control",
    "audit": "look for what a repository on the Hub still serves of the original, in any state of it",
    "card": "write the model card of a release from its report",
    "check": "check a folder before it is released: files, weights, card, secrets, and the forget set",
    "diff": "compare two models on disk, tensor by tensor",
    "doctor": "say what is installed, what is missing, and what is known not to go together",
    "estimate": "say what a step costs, and what fits a GPU, from a model's config alone",
    "evaluate": "measure what a model still knows of one data set and what it kept of another",
    "intervene": "change a model as little as it takes to make words or answers unreachable, or prompts refused",
    "push": "check a release and send it to the Hub as one commit, to where nothing serves the original",
    "quickstart": "make a small model that knows invented people, and make it forget some of them (no network)",
    "recipes": "list, show or copy the recipes that come along, with the published settings",
    "release": "make a folder that may leave from one that a trainer saved: merged, with the base's files and a card",
    "robustness-report": "run every attack, judge by thresholds declared before, and write report, pictures and text",
    "train": "make a model forget one data set and keep another",
    "train-probe": "train a probe that tells forget from retain rows by their hidden states",
    "verify": "check that a revision on the Hub holds what its report lists, and what a receipt says was sent",
}


class UsageError(Exception):
    """The command was not understood, or its inputs do not fit: one sentence that names the fix, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `hf-unlearn` console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(len(name) for name in COMMANDS)
        print("usage: hf-unlearn COMMAND [arguments]\n")
        print("Make a language model forget and resist, measure what is left, and release it.\n\ncommands:")
        for name, summary in COMMANDS.items():
            print(f"  {name:<{width}}  {summary}")
        print("\n`hf-unlearn COMMAND --help` lists the arguments of a command.")
        return 0
    if argv[0] == "--version":
        print(f"hf-unlearn {__version__}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean `{near[0]}`?" if near else f" Commands: {', '.join(COMMANDS)}."
        print(f"Error: `{argv[0]}` is not a command.{hint}", file=sys.stderr)
        return 2
    return run(importlib.import_module(f"hf_unlearn.cli.{name.replace('-', '_')}").main, argv[1:])


def run(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """
    Runs a command and turns what it raises into one sentence on stderr and an exit code.

    Set `HF_DEBUG=1`, as for `hf`, to see the traceback.
    """
    try:
        return command(argv)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("HF_DEBUG"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once, not once per process
            message = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, UsageError):
                print(f"Error: {message}", file=sys.stderr)
            else:  # a progress bar may stand on the line
                print(f"\nError: {message}\nSet HF_DEBUG=1 to see the traceback.", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
