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
"""What a check found: the rule, the file, and one sentence that never repeats what it found."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """
    One reason not to release.

    Parameters:
        rule (`str`):
            Name of the rule, such as `forget-answer`, by which it can be overridden.
        file (`str`):
            What it was found in: a path relative to the folder, or what else leaves, such as `commit message`.
        message (`str`):
            What is wrong and what to do, in one sentence, without the match.
        match_sha256 (`str`, *optional*):
            Hash of the match, by which an override names it; `None` for what is not about a text.
    """

    rule: str
    file: str
    message: str
    match_sha256: str | None = None


def match_hash(match: str) -> str:
    """
    Hash of a match, for an override that names it without repeating it.

    Args:
        match (`str`):
            The normalised text that was found.

    Returns:
        `str`: 64 hexadecimal digits.

    Example:

    ```python
    >>> from hf_unlearn.cards.findings import match_hash
    >>> match_hash("hsiao yun hwa")[:8]
    '0fbe4a18'

    ```
    """
    return hashlib.sha256(match.encode()).hexdigest()
