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
The pre-flight: every rule on a folder that is to be released, and on all names and messages that go with it.

A rule that cannot be applied, because there is no base or no forget set, is a finding as well: what was not checked is
never taken for clean. A finding is let through by naming it, with its rule, its file and what was matched.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.leaks import LeakScanner
from hf_unlearn.cards.licence import check_licence
from hf_unlearn.cards.manifest import EditManifest
from hf_unlearn.cards.release import Release, ReleaseFile, check_files, read_release
from hf_unlearn.cards.report import REPORT_NAME, UnlearningReport
from hf_unlearn.cards.secrets import scan_paths, scan_secrets
from hf_unlearn.cards.weight_check import ReadWeights, check_weights, read_weights, times_of_change


# What is read at once to be looked through; the largest tokenizers have half of it
_MAX_SCANNED = 64 * 2**20
# Of a file that no release holds: meaningless bytes, such as an optimizer's state, take eight seconds for a megabyte
_MAX_SCANNED_OTHER = 2**20

_UNSAID = "what is wrong cannot be said without repeating what must not leave: look for it where the rule says."

_ALLOWANCE = re.compile(r"([a-z0-9-]+)(?::([^:]+))?(?::([0-9a-f]{8,64}))?")


@dataclass(frozen=True)
class Allowance:
    """
    Findings that are let through: those of a rule, of a rule in one file, or one match of a rule in one file.

    Parameters:
        rule (`str`): name of the rule.
        file (`str`, *optional*): the file; all where unset.
        match (`str`, *optional*): first digits, at least 8, of the hash of the match; all where unset.
    """

    rule: str
    file: str | None = None
    match: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Allowance":
        """
        Reads `RULE`, `RULE:FILE` or `RULE:FILE:HASH`.

        Raises:
            `ValueError`: it is none of these.

        Example:

        ```python
        >>> from hf_unlearn.cards.check import Allowance
        >>> Allowance.parse("forget-entity:README.md:0fbe4a18")
        Allowance(rule='forget-entity', file='README.md', match='0fbe4a18')

        ```
        """
        parts = _ALLOWANCE.fullmatch(text)
        if parts is None:
            raise ValueError("An allowance is RULE, RULE:FILE or RULE:FILE:HASH, as the findings name them.")
        return cls(*parts.groups())

    def covers(self, finding: Finding) -> bool:
        """Whether it lets a finding through. A secret of this machine is let through by none."""
        return (
            self.rule == finding.rule
            and self.file in (None, finding.file)
            and (self.match is None or (finding.match_sha256 or "").startswith(self.match))
            and not finding.rule.startswith(("secret-environment", "secret-token-file"))
        )


@dataclass
class CheckResult:
    """
    What the checks found.

    Attributes:
        blocking (`list[Finding]`): what blocks the release.
        allowed (`list[Finding]`): what was let through by name.
        files (`dict[str, str]`): path -> SHA-256 of every file that would be released; a name that must not leave is
            not repeated here either.
    """

    blocking: list[Finding] = field(default_factory=list)
    allowed: list[Finding] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.blocking

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def check_release(
    folder: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
    entities: Iterable[str] = (),
    token_decoder: Callable[[list[int]], str] | None = None,
    names: Mapping[str, str] | None = None,
    allowances: Iterable[Allowance] = (),
    licence_acknowledged: bool = False,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> CheckResult:
    """
    Checks a folder that is to be released. Every file is opened once, without following links, and no weight file is
    read more than once.

    Args:
        folder (`str` or `os.PathLike`): the release.
        base (`str` or `os.PathLike`, *optional*): folder of the base model.
        rows (`Iterable[Mapping[str, Any]]`, *optional*): the forget set.
        entities (`Iterable[str]`, *optional*): further names that must not leave.
        token_decoder (`Callable[[list[int]], str]`, *optional*): decodes lists of token ids.
        names (`Mapping[str, str]`, *optional*): what leaves besides files, such as `{"repository": "org/name"}`.
        allowances (`Iterable[Allowance]`, *optional*): findings to let through.
        licence_acknowledged (`bool`, *optional*, defaults to `False`): whether the base is known to have no licence.
        environment (`Mapping[str, str]`, *optional*): variables whose secrets must not leave; those of this process
            where unset.
        progress (`Callable[[int], None]`, *optional*): told how many bytes of weights were read.

    Returns:
        [`CheckResult`]

    Raises:
        `ValueError`: a folder cannot be read, or base and release are of two architectures.
    """
    with open_gate(
        folder,
        base=base,
        rows=rows,
        entities=entities,
        token_decoder=token_decoder,
        allowances=allowances,
        licence_acknowledged=licence_acknowledged,
        environment=environment,
        progress=progress,
    ) as gate:
        return gate.check(names)


@contextmanager
def open_gate(
    folder: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    rows: Iterable[Mapping[str, Any]] | None = None,
    entities: Iterable[str] = (),
    token_decoder: Callable[[list[int]], str] | None = None,
    allowances: Iterable[Allowance] = (),
    licence_acknowledged: bool = False,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda size: None,
) -> Iterator["Gate"]:
    """
    Reads a folder once and holds what was read, so that what is checked is what is sent. Takes what
    [`check_release`] takes, but for the names, and raises the same.
    """
    with ExitStack() as stack:
        release = stack.enter_context(read_release(folder))
        written = times_of_change(release)
        base_release = None if base is None else stack.enter_context(read_release(base, hub_links=True))
        scanner = None if rows is None else LeakScanner(rows, entities=entities, token_decoder=token_decoder)
        weights = read_weights(folder, base, release, written, progress)
        yield Gate(
            release, base_release, weights, scanner, list(allowances), licence_acknowledged, environment, written
        )


@dataclass(frozen=True)
class Gate:
    """
    A folder that was read, all rules, and what they compare with, as [`open_gate`] gives it.

    Attributes:
        release ([`~hf_unlearn.cards.release.Release`]): the files, which stay open.
        base ([`~hf_unlearn.cards.release.Release`], *optional*): those of the base model.
        weights ([`~hf_unlearn.cards.weight_check.ReadWeights`]): what was found when the weights were read.
    """

    release: Release
    base: Release | None
    weights: ReadWeights
    _scanner: LeakScanner | None
    _allowances: list[Allowance]
    _licence_acknowledged: bool
    _environment: Mapping[str, str] | None
    _written: dict[str, tuple[int, int]]
    # Of texts that were looked through already: a push checks twice, and most of them did not change
    _scanned: dict[tuple[str, bytes], list[Finding]] = field(default_factory=dict)

    def unchanged(self) -> bool:
        """Whether nobody has written to the open files since they were read."""
        return times_of_change(self.release) == self._written

    def check(
        self, names: Mapping[str, str] | None = None, replaced: Mapping[str, bytes | None] | None = None
    ) -> CheckResult:
        """
        Applies every rule. The weights are not read again.

        Args:
            names (`Mapping[str, str]`, *optional*): what leaves besides files, such as `{"repository": "org/name"}`.
            replaced (`Mapping[str, bytes | None]`, *optional*): small files that leave in place of, or besides, those
                of the folder: path -> content, `None` for one that does not leave.

        Raises:
            `ValueError`: the licence of the base cannot be read.
        """
        release = self.with_files(replaced or {})
        names = dict(names or {})
        findings = check_files(release, self.base)
        if self.base is not None:
            try:
                findings += check_licence(release, self.base, acknowledged=self._licence_acknowledged)
            except ValueError as error:
                raise ValueError(f"The licence of the base cannot be read: {error}") from error
        if self._scanner is None:
            message = "no forget set was given, so nothing was looked for in what leaves: name it."
            findings.append(Finding("no-forget-set", "the folder", message))
        for file, content in _texts(release, self.base, names):
            if content is None:
                message = "it is too large to be looked through, so nothing was looked for in it: remove it."
                findings.append(Finding("not-scanned", file, message))
            else:
                findings += self.scan(file, content)
        report, report_findings = _read_report(release)
        findings += report_findings
        findings += check_weights(release, self.weights, report)
        if report is not None:
            findings += _check_report(release, report)
        if (content := release.content("edit_manifest.json")) is not None:
            try:
                EditManifest.from_json(content)
            except ValueError:
                findings.append(Finding("manifest", "edit_manifest.json", "it is no edit manifest: write it again."))
        result = CheckResult(files={path: file.sha256 for path, file in release.files.items()})
        fixed = {
            "the folder",
            "the weights",
            "README.md",
            REPORT_NAME,
            *names,
            *map(_withheld, range(len(release.files) + 1)),
        }
        self.judge(_without_matches(_without_names(findings, release), self.scan, fixed), result)
        secret = _secret_names(result.blocking, release)
        result.files = {secret.get(path, path): digest for path, digest in result.files.items()}
        return result

    def with_files(self, replaced: Mapping[str, bytes | None]) -> Release:
        """The release with other small files, and without some. It is closed with the gate, and not by itself."""
        release = Release()
        release.findings = self.release.findings
        kept = {path: file for path, file in self.release.files.items() if path not in replaced}
        new = {path: ReleaseFile(path, len(text), text) for path, text in replaced.items() if text is not None}
        release.files = dict(sorted({**kept, **new}.items()))
        return release

    def scan(self, file: str, content: bytes | str) -> list[Finding]:
        """What must not leave and is in a text: secrets, paths of this machine, and the forget set."""
        text = content.encode(errors="surrogatepass") if isinstance(content, str) else content
        key = file, hashlib.sha256(text).digest()
        if key not in self._scanned:
            found = scan_secrets(file, content, self._environment) + scan_paths(file, content)
            self._scanned[key] = found + ([] if self._scanner is None else self._scanner.scan(file, content))
        return self._scanned[key]

    def judge(self, findings: Iterable[Finding], result: CheckResult) -> None:
        """Adds findings to those that block or, where they were let through by name, to those that do not."""
        for finding in dict.fromkeys(findings):
            allowed = any(allowance.covers(finding) for allowance in self._allowances)
            (result.allowed if allowed else result.blocking).append(finding)


def _texts(
    release: Release, base: Release | None, names: Mapping[str, str]
) -> Iterator[tuple[str, bytes | str | None]]:
    """
    What to scan: names and messages, and what each file says, `None` where that is too much. What the base has too,
    byte for byte, is known.
    """
    yield from names.items()
    for number, (path, file) in enumerate(release.files.items(), start=1):
        yield _withheld(number), path
        theirs = base.files.get(path) if base is not None else None
        if theirs is not None and theirs.size == file.size and kind_of(path) in ("tokenizer", "licence", "code"):
            if theirs.sha256 == file.sha256:
                continue
        if kind_of(path) == "weights":
            yield path, _header(file)
        elif file.size > (_MAX_SCANNED_OTHER if kind_of(path) == "other" else _MAX_SCANNED):
            yield path, None
        else:
            yield path, file.read(0, file.size)


def _withheld(number: int) -> str:
    return f"the name of file {number}, in alphabetical order"


def _secret_names(findings: list[Finding], release: Release) -> dict[str, str]:
    """The paths that must not leave, and what they are called instead."""
    flagged = {finding.file for finding in findings}
    return {path: _withheld(n) for n, path in enumerate(release.files, start=1) if _withheld(n) in flagged}


def _without_names(findings: list[Finding], release: Release) -> Iterator[Finding]:
    """A file name that must not leave is not repeated by the other findings on that file."""
    secret = _secret_names(findings, release)
    for finding in findings:
        for path, label in secret.items():
            file = label if finding.file == path else finding.file
            finding = replace(finding, file=file, message=finding.message.replace(path, label))
        yield finding


def _without_matches(
    findings: Iterable[Finding], scan: Callable[[str, str], list[Finding]], fixed: set[str]
) -> Iterator[Finding]:
    """
    What a finding says is scanned as well: names of tensors, keys of a report and files that are not released are
    quoted in it, and any of these may be what must not leave.
    """
    findings = list(findings)
    quoted = [text for finding in findings for text in (finding.file, finding.message)]
    if not scan("findings", "\n".join(dict.fromkeys(quoted))):
        yield from findings
        return
    for finding in findings:
        if finding.file not in fixed and scan("findings", finding.file):
            finding = replace(finding, file="a file whose name must not leave", message=_UNSAID)
        elif scan("findings", finding.message):
            finding = replace(finding, message=_UNSAID)
        yield finding


def _header(file: ReleaseFile) -> bytes:
    """The header of a weight file, where it says anything; its structure is checked elsewhere."""
    length = int.from_bytes(file.read(0, 8), "little")
    return file.read(8, min(length, 8 * 2**20))


def _read_report(release: Release) -> tuple[UnlearningReport | None, list[Finding]]:
    content = release.content(REPORT_NAME)
    if content is None:
        return None, []  # that it is missing is said already
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None, [Finding("report", REPORT_NAME, "it is no JSON file: write it again.")]
    try:
        return UnlearningReport.from_dict(values), []
    except ValueError as error:
        # It names a field and never a value
        return None, [Finding("report", REPORT_NAME, f"{str(error).rstrip('.')}.")]


def _check_report(release: Release, report: UnlearningReport) -> Iterator[Finding]:
    """That the card was rendered from this report, and that the report lists these files."""
    card = release.content("README.md")
    digest = release.files[REPORT_NAME].sha256
    if card is not None and digest.encode() not in card:
        message = "it does not name the hash of the report beside it: render it again with `hf-unlearn card build`."
        yield Finding("card-stale", "README.md", message)
    listed = {entry.path: entry for entry in report.files}
    for number, (path, entry) in enumerate(listed.items(), start=1):
        file = release.files.get(path)
        if file is None:
            # Not by its name, which may be any text
            message = f"file {number} of its list is not there: put it back, or build the card again."
            yield Finding("report-files", REPORT_NAME, message)
        elif (file.size, file.sha256) != (entry.size, entry.sha256):
            message = "it is not the file that the report lists: put that one back, or build the card again."
            yield Finding("report-files", path, message)
    for path in release.files:
        if kind_of(path) in ("weights", "index") and path not in listed:
            yield Finding("report-files", path, "the report does not list it: remove it, or build the card again.")
