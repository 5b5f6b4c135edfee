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
"""Secrets and absolute paths in what leaves: tokens, keys, passwords of the environment, folders of the machine."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hf_unlearn.cards.decoding import decoded_views, visible
from hf_unlearn.cards.findings import Finding, match_hash


# By rule; a group named `value` is looked at for placeholders
_SECRETS = {
    "secret-hugging-face": r"(?<![A-Za-z0-9])(?:hf_|api_org_)(?P<value>[A-Za-z0-9]{20,})",
    "secret-aws": r"(?<![A-Za-z0-9])(?:AKIA|ASIA)(?P<value>[0-9A-Z]{16})(?![0-9A-Za-z])"
    r"|(?i:aws_?secret_?access_?key)[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+=]{40}(?![A-Za-z0-9/+=])",
    "secret-github": r"(?<![A-Za-z0-9])(?:gh[pousr]_(?P<value>[A-Za-z0-9]{30,})|github_pat_[A-Za-z0-9_]{22,})",
    "secret-openai": r"(?<![A-Za-z0-9-])sk-(?=[\w-]{0,200}\d)(?=[\w-]{0,200}[A-Z])(?P<value>[\w-]{20,250})",
    "secret-slack": r"(?<![A-Za-z0-9])xox[abeoprs]-(?P<value>[A-Za-z0-9-]{10,})"
    r"|hooks\.slack\.com/services/T\w+/B\w+/\w{8,}",
    "secret-google": r"(?<![A-Za-z0-9])(?:AIza(?P<value>[\w-]{35})|ya29\.[\w-]{20,}|GOCSPX-[\w-]{20,})",
    "secret-private-key": r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----",
    "secret-jwt": r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*",
    "secret-authorization": r"(?i:authorization)[\"']?\s*[:=]\s*[\"']?(?i:bearer|basic|token)\s+"
    r"(?P<value>[A-Za-z0-9][\w.~+/=-]{7,})",
    "secret-url": r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s/:@<>\"'`{}$]{0,200}:"
    r"(?P<value>[^\s/@<>\"'`{}$*]{3,200})@[\w.-]",
}
_PATTERNS = {rule: re.compile(pattern) for rule, pattern in _SECRETS.items()}
_SECRET_NAME = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL)S?(?:_|$)")
_SHORTEST_VALUE = 8

# Folders that hold a user's or a cluster's files; not those of a system, such as the /usr/bin of a script's first line
_ROOTS = (
    r"home|root|Users|tmp|var|mnt|media|opt|srv|scratch|workspace|private|Volumes|kaggle|content/drive|gpfs\w*|lustre"
    r"|nfs|fsx|work|dev/shm"
)
_FILE_ENDINGS = r"bin|ckpt|csv|gguf|json|jsonl|log|npy|npz|onnx|parquet|pkl|pt|pth|py|safetensors|txt|yaml|yml|model"
# What comes before: nothing that makes it the middle of a URL, of a relative path, of a placeholder or of a tag
_BEFORE = r"(?<![\w/.:~%$}>*<!-])"
_PATHS = re.compile(
    rf"{_BEFORE}/(?:{_ROOTS})/[\w.~$@+-]"
    rf"|{_BEFORE}/data/[\w.@+-]+/[\w.@+-]"
    rf"|{_BEFORE}/(?:[\w.@+-]+/){{2,20}}[\w.@+-]*\.(?:{_FILE_ENDINGS})(?!\w)"
    r"|(?i:\bfile://)[\w/.~%-]"
    r"|(?<![\w/.~\\])~[a-z]{0,32}/[A-Za-z.]"
    r"|(?<!\w)[A-Za-z]:[\\/]+(?i:Users|Documents and Settings|Program Files|ProgramData|Windows|Temp|home)[\\/]"
)
_SHORTEST_IN_BYTES = 10
_REST_OF_PATH = re.compile(r"[\w./\\~$@+:%-]{0,200}")


def scan_secrets(file: str, text: bytes | str, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """
    Looks for secrets: in the text itself and in all that it says decoded, see [`~cards.decoding.decoded_views`].

    Found are tokens of Hugging Face, AWS, GitHub, OpenAI (and others that begin with `sk-`), Slack and Google, blocks
    of private keys, JSON web tokens, `Authorization` headers, URLs with a password, the values of at least 8
    characters of all environment variables with a part of the name that ends in TOKEN, KEY, SECRET, PASSWORD or the
    like, and the tokens that `hf auth login` stored. Not found are secrets of no known form that the environment does
    not have, such as passwords in prose: nothing is guessed from how random a text looks. Placeholders such as
    `hf_xxxx` pass.

    Args:
        file (`str`):
            What is scanned, for the findings.
        text (`bytes` or `str`):
            The content.
        environment (`Mapping[str, str]`, *optional*):
            Names and values, those of this process where unset; `HF_TOKEN_PATH`, `HF_HOME`, `XDG_CACHE_HOME` and
            `HOME` tell where tokens are stored.

    Returns:
        `list[Finding]`: One for each rule and distinct secret, in the order of the rules. Those of the environment
        have no hash, so that none can be let through.

    Example:

    ```python
    >>> from hf_unlearn.cards.secrets import scan_secrets
    >>> environment = {"DB_PASSWORD": "correct-horse"}
    >>> [finding.rule for finding in scan_secrets("README.md", "use correct-horse", environment)]
    ['secret-environment']

    ```
    """
    findings: dict[tuple[str, str | None], Finding] = {}
    # Not as a default value, which would be what `os.environ` was when this module was imported
    known = dict(_known_secrets(os.environ if environment is None else environment))
    for view in decoded_views(text):
        shown = visible(view.text)
        # Without white space too: a long token may have been wrapped
        joined = "".join(shown.split())
        for secret, rule in known.items():
            if secret in shown or secret in joined:
                findings.setdefault((rule, None), _secret(rule, file, None))
        for rule, pattern in _PATTERNS.items():
            for match in pattern.finditer(shown):
                if not _is_placeholder(rule, match.groupdict().get("value")):
                    digest = match_hash(match[0])
                    findings.setdefault((rule, digest), _secret(rule, file, digest))
    order = ["secret-environment", "secret-token-file", *_PATTERNS]
    return sorted(findings.values(), key=lambda finding: order.index(finding.rule))


def scan_paths(file: str, text: bytes | str) -> list[Finding]:
    """
    Looks for absolute paths, which tell of users and machines: in the text itself and in all that it says decoded.

    Found are paths below folders that hold users' and clusters' files (`/home`, `/root`, `/Users`, `/tmp`, `/mnt` and
    others), in `~` and below `C:\\Users` and its like, `file://` addresses, and paths of at least two folders to a
    file with the ending of data or code. Not found are other paths, such as `/disk7/runs`, which
    look like an API's routes, and within bytes short ones in `~`.

    Args:
        file (`str`):
            What is scanned, for the findings.
        text (`bytes` or `str`):
            The content.

    Returns:
        `list[Finding]`: One for each distinct path, of rule `absolute-path`.

    Example:

    ```python
    >>> from hf_unlearn.cards.secrets import scan_paths
    >>> len(scan_paths("config.json", '{"_name_or_path": "/home/me/model", "route": "/models/1"}'))
    1

    ```
    """
    findings = {}
    for view in decoded_views(text):
        shown = visible(view.text)
        for match in _PATHS.finditer(shown):
            rest = _REST_OF_PATH.match(shown, match.end())
            # Three signs stand in meaningless bytes, such as a picture's pixels, by chance
            if view.binary and match[0].startswith("~") and len(match[0] + rest[0]) < _SHORTEST_IN_BYTES:
                continue
            digest = match_hash(match[0] + rest[0])
            place = f", {view.form}" if view.form else f", line {1 + shown.count(chr(10), 0, match.start())}"
            message = f"{file}{place}: an absolute path (absolute-path): remove it, or make it relative"
            findings.setdefault(digest, Finding("absolute-path", file, message, digest))
    return list(findings.values())


def _secret(rule: str, file: str, digest: str | None) -> Finding:
    meanings = {
        "secret-environment": "the value of an environment variable whose name says that it is secret",
        "secret-token-file": "a token stored by `hf auth login`",
    }
    meaning = meanings.get(rule, f"what looks like a {rule.removeprefix('secret-').replace('-', ' ')} secret")
    return Finding(rule, file, f"{file}: {meaning} ({rule}): remove it, and revoke it if it has left before", digest)


def _known_secrets(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Secrets with their rule."""
    for name, value in environment.items():
        if _SECRET_NAME.search(name.upper()) and len(value.strip()) >= _SHORTEST_VALUE:
            yield value.strip(), "secret-environment"
    home = Path(environment.get("HOME", "~")).expanduser()
    cache = Path(environment.get("XDG_CACHE_HOME", home / ".cache"))
    folder = Path(environment.get("HF_HOME", cache / "huggingface"))
    token_file = Path(environment.get("HF_TOKEN_PATH", folder / "token"))
    for path in (token_file, token_file.with_name("stored_tokens")):
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            # Nobody logged in here
            continue
        # One token, or lines such as `hf_token = ...` under the name of each
        for line in content.splitlines():
            value = line.rpartition("=")[2].strip()
            if len(value) >= _SHORTEST_VALUE and not value.startswith("["):
                yield value, "secret-token-file"


def _is_placeholder(rule: str, value: str | None) -> bool:
    if value is None:
        return False
    if len(set(value.lower()) - set("-_.")) <= 2:
        return True
    # `YOUR_TOKEN_HERE` and `hf_xxxx` have no digit; a header with a real token has one
    return rule == "secret-authorization" and len(value) < 40 and not any(map(str.isdigit, value))
