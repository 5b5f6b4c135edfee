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
Say what is installed, what is missing, and what is known not to go together.

```bash
hf-unlearn doctor
```

Exit code 0 unless a package that hf-unlearn needs is missing, too old or broken. No GPU, no login and no network are
notes: all but large models works without them.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hf_unlearn._version import __version__

from . import run
from .diff import Parser


# What is imported under another name than it is installed under
_MODULES = {"huggingface-hub": "huggingface_hub", "rouge-score": "rouge_score", "jinja2": "jinja2"}
# Used where they are there: package -> what for
_OPTIONAL = {
    "matplotlib": "the pictures of the card (pip install 'hf-unlearn[plots]')",
    "nanogcg": "the attack gcg (pip install 'hf-unlearn[gcg]')",
    "lm-eval": "the harness's tasks (pip install 'hf-unlearn[lm-eval]')",
    "bitsandbytes": "QLoRA",
    "deepspeed": "ZeRO",
    "flash-attn": "faster attention on GPUs",
    "hf-xet": "faster downloads from the Hub",
}
# Versions that work with limits: package, versions, what is known of them
_KNOWN = [
    ("torch", "<2.8", "FSDP2 needs 2.8"),
    ("nanogcg", ">=0.3", "it asks for transformers<=4.47.1, so that `pip check` complains; the attack works"),
]
_GIGABYTE = 10**9
_LITTLE_DISK = 10 * _GIGABYTE


@dataclass(frozen=True)
class Check:
    """
    What was looked at.

    Parameters:
        group (`str`): `Packages`, `Optional packages`, `Machine` or `Hub`.
        name (`str`): what.
        status (`str`): `ok`, `note`, which is good to know, or `broken`, which is not.
        message (`str`): what was found and, where it is not `ok`, what to do.
    """

    group: str
    name: str
    status: Literal["ok", "note", "broken"]
    message: str


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn doctor",
        description="Say what is installed, what is missing, and what is known not to go together. Exit code 1 where "
        "a package that is needed is missing, too old or broken.",
        allow_abbrev=False,
    )
    parser.add_argument("--offline", action="store_true", help="Ask nobody on the network.")
    parser.add_argument("--json", action="store_true", help="Print what was found as JSON.")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    checks = list(examine(args))
    if args.json:
        print(json.dumps({"version": __version__, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print(as_text(checks))
    return 1 if any(check.status == "broken" for check in checks) else 0


def examine(args: argparse.Namespace) -> Iterator[Check]:
    """All that is looked at, in the order in which it is printed."""
    yield from examine_packages()
    for name, purpose in _OPTIONAL.items():
        found = _version(name)
        yield Check("Optional packages", name, "ok" if found else "note", found or f"not there; for {purpose}")
    for name, versions, message in _KNOWN:
        found = _version(name)
        if found is not None and SpecifierSet(versions).contains(found, prereleases=True):
            yield Check("Optional packages", name, "note", f"{found}: {message}")
    yield from examine_machine()
    yield from examine_hub(args.offline)


def examine_packages() -> Iterator[Check]:
    """What hf-unlearn needs: its own metadata name the bounds, and each package has to be importable."""
    yield Check("Packages", "hf-unlearn", "ok", __version__)
    yield Check("Packages", "python", "ok", platform.python_version())
    for text in requires("hf-unlearn"):
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield examine_package(requirement)


def examine_package(requirement: Requirement) -> Check:
    """One package: there, new enough, and importable."""
    name, found = requirement.name, _version(requirement.name)
    if found is None:
        return Check("Packages", name, "broken", f"not there: pip install '{requirement}'")
    if not requirement.specifier.contains(found, prereleases=True):
        return Check(
            "Packages", name, "broken", f"{found}, and {requirement.specifier} is needed: pip install '{requirement}'"
        )
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # whatever a broken installation raises
        message = f"{found} cannot be imported ({type(error).__name__}): pip install --force-reinstall '{requirement}'"
        return Check("Packages", name, "broken", message)
    return Check("Packages", name, "ok", found)


def examine_machine() -> Iterator[Check]:
    """Devices, memory and disk."""
    try:
        import torch
    except Exception:  # which the packages say
        torch = None
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: train with --fp16 false and --bf16 false"
            memory = f"{properties.total_memory / _GIGABYTE:.0f} GB"
            yield Check("Machine", f"GPU {index}", "ok", f"{properties.name}, {memory}, {bf16}")
    else:
        yield Check("Machine", "GPU", "note", "none that torch can use: small models run on the CPU")
    yield Check("Machine", "CPU", "ok", f"{os.cpu_count()} cores")
    cache = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    free = shutil.disk_usage(_that_is_there(cache)).free
    status, more = ("ok", "") if free >= _LITTLE_DISK else ("note", ", too little for most models: set HF_HOME")
    yield Check("Machine", "disk", status, f"{free / _GIGABYTE:.0f} GB free where models are kept{more}")
    for name, why in (
        ("CUDA_LAUNCH_BLOCKING", "every step waits for the GPU: unset it"),
        ("TRANSFORMERS_OFFLINE", "models are read from the cache alone"),
        ("HF_HUB_OFFLINE", "nothing is read from or sent to the Hub"),
    ):
        if os.environ.get(name, "0") not in ("", "0"):
            yield Check("Machine", name, "note", f"is set: {why}")


def examine_hub(offline: bool) -> Iterator[Check]:
    """Login and network, without which all but the Hub works. No token is printed."""
    try:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HfHubHTTPError
    except Exception:  # which the packages say
        return
    if get_token() is None:
        yield Check("Hub", "login", "note", "none: `hf auth login` before `push`, gated models or private data")
        return
    if offline:
        yield Check("Hub", "login", "ok", "there is a token; nobody was asked whether it is valid")
        return
    try:
        user = HfApi().whoami()
    except HfHubHTTPError as error:
        message = f"the Hub refuses the token ({error.response.status_code}): run `hf auth login` again"
        yield Check("Hub", "login", "note", message)
    except Exception:  # the exceptions of the transport differ between releases of the client
        yield Check("Hub", "network", "note", "the Hub cannot be reached: check the network and HF_ENDPOINT")
    else:
        role = user.get("auth", {}).get("accessToken", {}).get("role", "unknown role")
        yield Check(
            "Hub", "login", "ok", f"{user['name']}, a token that may {role}" if role != "fineGrained" else user["name"]
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _that_is_there(path: str) -> str:
    while not os.path.isdir(path):
        path = os.path.dirname(path) or os.curdir
    return path


def as_text(checks: list[Check]) -> str:
    """By group, what is not in order marked, and the outcome."""
    width = max(len(check.name) for check in checks)
    lines: list[str] = []
    for group in dict.fromkeys(check.group for check in checks):
        lines += [*([""] if lines else []), group]
        marks = {"ok": " ", "note": "-", "broken": "!"}
        lines += [
            f"  {marks[check.status]} {check.name:<{width}}  {check.message}"
            for check in checks
            if check.group == group
        ]
    broken = [check.name for check in checks if check.status == "broken"]
    outcome = f"Broken: {', '.join(broken)}. See above what to do." if broken else "Ready."
    notes = sum(check.status == "note" for check in checks)
    if not broken and notes:
        outcome += f" {notes} note{'s' * (notes > 1)} (-) on what is not there."
    return re.sub(r" +$", "", "\n".join([*lines, "", outcome]), flags=re.MULTILINE)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
