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
"""The licence of the base: inherited as it is, or left out, never chosen for the publisher."""

import os
from dataclasses import dataclass, field
from typing import Any

from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.merge import LICENCE_KEYS
from hf_unlearn.cards.metadata import metadata_problems, parse_card
from hf_unlearn.cards.release import Release, read_release


@dataclass
class InheritedLicence:
    """
    What a release takes over from its base.

    Parameters:
        metadata (`dict`): `license`, `license_name` and `license_link`, those that the base has.
        files (`dict[str, bytes]`): LICENSE, NOTICE and USE_POLICY files, byte for byte.
        findings (`list[Finding]`): `licence-unresolved` where the base says nothing.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def inherit_licence(
    base: Release | str | os.PathLike, base_metadata: dict[str, Any] | None = None, acknowledged: bool = False
) -> InheritedLicence:
    """
    The licence of the base: its keys and its files.

    The licence is resolved where the base names one (`unknown` names none), or has a licence file. What the base does
    not say is left out: no text is taken for the identifier of a licence.

    Args:
        base ([`Release`] or a path):
            The folder of the base; a path may be a snapshot in the Hub's cache.
        base_metadata (`dict`, *optional*):
            Metadata of the base's card. By default that of the `README.md` in the folder.
        acknowledged (`bool`, *optional*, defaults to `False`):
            Whether the publisher has said that the licence cannot be resolved.

    Returns:
        [`InheritedLicence`]

    Raises:
        `ValueError`: The folder or the card of the base cannot be read, or a licence file is too large to be one.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_unlearn.cards.licence import inherit_licence

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "README.md").write_text("---\\nlicense: llama2\\n---\\n")
    ...     _ = Path(folder, "USE_POLICY.md").write_text("Be kind.")
    ...     inherit_licence(folder)
    InheritedLicence(metadata={'license': 'llama2'}, files={'USE_POLICY.md': b'Be kind.'}, findings=[])

    ```
    """
    if not isinstance(base, Release):
        with read_release(base, hub_links=True) as release:
            return inherit_licence(release, base_metadata, acknowledged)
    files = {}
    for path, file in base.files.items():
        if kind_of(path) == "licence":
            if file.content is None:
                raise ValueError(f"{path} of the base is too large for a text: look at the base.")
            files[path] = file.content
    if base_metadata is None:
        base_metadata = _card_metadata(base)
    bad = {
        key for key, _ in metadata_problems({key: base_metadata[key] for key in LICENCE_KEYS if key in base_metadata})
    }
    metadata = {key: base_metadata[key] for key in LICENCE_KEYS if key in base_metadata and key not in bad}
    link = metadata.get("license_link", "https://")
    if not link.startswith("https://") and link not in files:
        # In the release it would lead nowhere
        del metadata["license_link"]
    texts = [path for path in files if path.upper().startswith("LIC")]
    named = metadata.get("license", [])
    named = [name for name in (named if isinstance(named, list) else [named]) if name != "unknown"]
    if not named:
        metadata = {}
    # "other" says that there is one, not which
    resolved = bool(texts or [name for name in named if name != "other"] or (named and "license_link" in metadata))
    findings = []
    if not resolved and not acknowledged:
        message = (
            "the base names no licence and has no licence file: ask its publisher, or acknowledge that it has none."
        )
        findings.append(Finding("licence-unresolved", "README.md", message))
    return InheritedLicence(metadata, files, findings)


def check_licence(
    release: Release,
    base: Release,
    base_metadata: dict[str, Any] | None = None,
    acknowledged: bool = False,
) -> list[Finding]:
    """
    Whether a release has the licence of its base: the same keys, the same files.

    Args:
        release ([`Release`]):
            The folder that is to be released.
        base ([`Release`]):
            The folder of the base.
        base_metadata (`dict`, *optional*):
            Metadata of the base's card, as for [`inherit_licence`].
        acknowledged (`bool`, *optional*, defaults to `False`):
            As for [`inherit_licence`]; then the release may name a licence of its own.

    Returns:
        `list[Finding]`: Rules `licence-unresolved` and `licence-differs`.
    """
    inherited = inherit_licence(base, base_metadata, acknowledged)
    findings = list(inherited.findings)
    for path, content in inherited.files.items():
        if release.content(path) != content:
            message = "it is not the base's, byte for byte, or is missing: copy the base's file."
            findings.append(Finding("licence-differs", path, message))
    for path in release.files:
        # Another text beside the base's could grant what the base does not
        if kind_of(path) == "licence" and path not in inherited.files and not acknowledged:
            findings.append(Finding("licence-differs", path, "the base does not have it: remove it."))
    try:
        metadata = _card_metadata(release)
    except ValueError:
        return findings  # which the check of the card says
    own = {key: metadata[key] for key in LICENCE_KEYS if key in metadata}
    if own != inherited.metadata and not (acknowledged and not inherited.metadata):
        keys = [f"`{key}`" for key in LICENCE_KEYS if own.get(key) != inherited.metadata.get(key)]
        message = (
            f"{' and '.join(keys)} of the card {'are' if len(keys) > 1 else 'is'} not the base's: inherit or omit."
        )
        findings.append(Finding("licence-differs", "README.md", message))
    return findings


def _card_metadata(release: Release) -> dict[str, Any]:
    content = release.content("README.md") or b""
    try:
        return parse_card(content.decode("utf-8"))[0]
    except UnicodeDecodeError:
        raise ValueError("README.md is no text in UTF-8: write it again.") from None
