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
"""How a release is sent, what stood in its way, and what was done: the receipt."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_unlearn._version import __version__
from hf_unlearn.cards.check import CheckResult
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.report import Disclosure, FileEntry


CardMode = Literal["merge", "new", "keep", "pr"]

MESSAGE = "Release an unlearned model"


class Blocked(Exception):
    """
    Something stands in the way of a push, and nothing was sent.

    Attributes:
        result ([`~hf_unlearn.cards.check.CheckResult`]): what.
    """

    def __init__(self, result: CheckResult):
        count = len(result.blocking)
        first = result.blocking[0]
        super().__init__(
            f"{count} finding{'s' * (count > 1)} in the way of this release, the first in {first.file}, by the rule "
            f"`{first.rule}`: nothing was sent."
        )
        self.result = result


@dataclass(frozen=True)
class PushOptions:
    """
    How a release is sent.

    Parameters:
        public (`bool`, *optional*, defaults to `False`):
            Whether the repository may be public. A new one, or one that holds nothing but this release, is made public
            as the last step; without it, a public repository is refused.
        pull_request (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead of writing to main. There is no tag then.
        card_mode (`str`, *optional*, defaults to `"merge"`):
            What becomes of the card in the repository: `"merge"` keeps what a person wrote there, `"new"` puts that of
            the folder in its place, `"keep"` leaves it, and `"pr"` leaves it and proposes that of the folder.
        repair_card (`bool`, *optional*, defaults to `False`):
            Whether to drop what is at fault in the metadata of the card there.
        disclosure (`str`, *optional*):
            Level at which card and report are rendered anew; those of the folder leave as they are where unset.
        message (`str`, *optional*):
            Of the commit.
        tag (`str`, *optional*):
            Of the release; `release-` and the first digits of a hash over all its files where unset.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to stop before the first request that writes.
    """

    public: bool = False
    pull_request: bool = False
    card_mode: CardMode = "merge"
    repair_card: bool = False
    disclosure: Disclosure | None = None
    message: str = MESSAGE
    tag: str | None = None
    dry_run: bool = False


@dataclass
class Receipt:
    """
    What a push did, for the publisher's files.

    Attributes:
        repo_id (`str`): the repository.
        endpoint (`str`): the Hub.
        private (`bool`, *optional*): whether others see nothing of it; `None` where it was not looked at.
        revision (`str`): `main`, or `refs/pr/N`.
        commit (`str`, *optional*): with the release; `None` after a dry run that would have made one.
        parent (`str`, *optional*): the commit before it, where this push made it.
        tag (`str`, *optional*): of the commit.
        files (`list[FileEntry]`): all files of the release.
        sent, unchanged, deleted (`list[str]`): their paths: sent, there already, and removed from the repository.
        allowed (`list[Finding]`): what was let through by name.
        checks (`list[str]`): what was checked.
        parameters (`int`, *optional*): of the weights, as the Hub reads them.
        card_pull_request (`str`, *optional*): with the card, in the mode `pr`.
        dry_run (`bool`): whether nothing was sent.
        seconds (`float`): it took.
        created (`str`): when, in ISO 8601.
        tool_version (`str`): of hf-unlearn.
        schema (`int`): version of this format.
    """

    repo_id: str
    endpoint: str
    private: bool | None = None
    revision: str = "main"
    commit: str | None = None
    parent: str | None = None
    tag: str | None = None
    files: list[FileEntry] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    allowed: list[Finding] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    parameters: int | None = None
    card_pull_request: str | None = None
    dry_run: bool = False
    seconds: float = 0.0
    created: str = ""
    tool_version: str = __version__
    schema: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
