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

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_unlearn.cards.diff import ModelDiff, diff_models
from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.leaks import LeakScanner
from hf_unlearn.cards.licence import check_licence
from hf_unlearn.cards.manifest import EditManifest
from hf_unlearn.cards.release import Release, ReleaseFile, check_files, read_release
from hf_unlearn.cards.report import REPORT_NAME, Footprint, UnlearningReport
from hf_unlearn.cards.secrets import scan_paths, scan_secrets
from hf_unlearn.cards.tensor_files import INDEX_NAME, ModelFileError, ModelTensors, open_model


# How far a norm in the report may be from the one measured: it was summed in another order
_RELATIVE_TOLERANCE = 1e-3

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
    names = dict(names or {})
    with ExitStack() as stack:
        release = stack.enter_context(read_release(folder))
        written = _times_of_change(release)
        base_release = None if base is None else stack.enter_context(read_release(base, hub_links=True))
        findings = check_files(release, base_release)
        if base_release is not None:
            try:
                findings += check_licence(release, base_release, acknowledged=licence_acknowledged)
            except ValueError as error:
                raise ValueError(f"The licence of the base cannot be read: {error}") from error
        scanner = None
        if rows is not None:
            scanner = LeakScanner(rows, entities=entities, token_decoder=token_decoder)
        else:
            message = "no forget set was given, so nothing was looked for in what leaves: name it."
            findings.append(Finding("no-forget-set", "the folder", message))

        def scan(file: str, content: bytes | str) -> list[Finding]:
            found = scan_secrets(file, content, environment) + scan_paths(file, content)
            return found if scanner is None else found + scanner.scan(file, content)

        for file, content in _texts(release, base_release, names):
            if content is None:
                message = "it is too large to be looked through, so nothing was looked for in it: remove it."
                findings.append(Finding("not-scanned", file, message))
            else:
                findings += scan(file, content)
        report, report_findings = _read_report(release)
        findings += report_findings
        findings += _check_weights(folder, base, release, report, written, progress)
        if report is not None:
            findings += _check_report(release, report)
        if (content := release.content("edit_manifest.json")) is not None:
            try:
                EditManifest.from_json(content)
            except ValueError:
                findings.append(Finding("manifest", "edit_manifest.json", "it is no edit manifest: write it again."))
        result = CheckResult(files={path: file.sha256 for path, file in release.files.items()})
    allowances = list(allowances)
    fixed = {
        "the folder",
        "the weights",
        "README.md",
        REPORT_NAME,
        *names,
        *map(_withheld, range(len(release.files) + 1)),
    }
    for finding in dict.fromkeys(_without_matches(_without_names(findings, release), scan, fixed)):
        allowed = any(allowance.covers(finding) for allowance in allowances)
        (result.allowed if allowed else result.blocking).append(finding)
    secret = _secret_names(result.blocking, release)
    result.files = {secret.get(path, path): digest for path, digest in result.files.items()}
    return result


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


def _times_of_change(release: Release) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of the files that are held open."""
    statuses = {path: os.fstat(file.descriptor) for path, file in release.files.items() if file.descriptor >= 0}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in statuses.items()}


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


def _check_weights(
    folder: str | os.PathLike,
    base: str | os.PathLike | None,
    release: Release,
    report: UnlearningReport | None,
    written: dict[str, tuple[int, int]],
    progress: Callable[[int], None],
) -> list[Finding]:
    """What the weights are: finite, other than the base's, and as far from them as the report says."""
    if not any(kind_of(path) == "weights" for path in release.files):
        return []
    with ExitStack() as stack:
        try:
            other = None if base is None else stack.enter_context(open_model(base, hub_links=True))
        except ModelFileError as error:
            raise ValueError(f"The base cannot be read: {error}.") from error
        try:
            model = stack.enter_context(open_model(folder))
            changed = _changed_meanwhile(release, model)
            if not changed:
                difference = diff_models(other, model, progress)
                now = _times_of_change(release)
                changed = [path for path in model.files if now[path] != written[path]]
        except ModelFileError as error:
            # By a rule of its own: who lets that of a header through has not let through what was not looked at
            message = "they could not be read, so they were not compared: see what else was found."
            return [error.finding, Finding("weights-not-compared", "the weights", message)]
        if changed:
            return [
                Finding("changed-while-read", path, "it changed while it was read: try again.") for path in changed
            ]
        base_file_of = {} if other is None else {name: entry.file for name, entry in other.tensors.items()}
    for entry in difference.new_files:
        release.files[entry.path].sha256 = entry.sha256  # read whole just now: not once more
    findings = []
    if difference.not_finite:
        findings.append(Finding("not-finite", "the weights", "they hold NaN or infinite values: nothing to release."))
    if base is not None:
        findings += _check_difference(release, difference, base_file_of, report)
    return findings


def _changed_meanwhile(release: Release, model: ModelTensors) -> list[str]:
    """Files that are not those that were read before: another one lies under the name."""

    def identity(descriptor: int) -> tuple[int, int]:
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino

    changed = [
        name
        for name, file in model.files.items()
        if name not in release.files or identity(file.descriptor) != identity(release.files[name].descriptor)
    ]
    return changed + [INDEX_NAME] * (model.index is not None and model.index != release.content(INDEX_NAME))


def _check_difference(
    release: Release, difference: ModelDiff, base_file_of: dict[str, str], report: UnlearningReport | None
) -> Iterator[Finding]:
    if difference.is_same:
        yield Finding("weights-same", "the weights", "they are the base's, bit for bit: nothing was unlearned.")
        return
    untied = {"lm_head.weight"} if report is not None and _names_head(report.footprint) else set()
    for tensor in difference.tensors:
        if tensor.status in ("only_in_base", "only_in_new") and tensor.name not in untied:
            where = "the base has no" if tensor.status == "only_in_new" else "only the base has a"
            yield Finding("weights-differ", "the weights", f"{where} tensor {tensor.name!r}: save the model again.")
        elif tensor.status == "other_shape":
            message = f"the tensor {tensor.name!r} has another shape than the base's: save the model again."
            yield Finding("weights-differ", "the weights", message)
    if difference.kind == "model":
        yield from _check_base_shards(release, difference, base_file_of)
    if report is None:
        return
    if report.footprint is None:
        yield Finding("footprint", REPORT_NAME, "it has no footprint: build the card with --base, which measures it.")
        return
    try:
        measured = difference.footprint()
    except ValueError:
        return  # not finite, which is said
    yield from _check_footprint(measured, report.footprint)


def _names_head(footprint: Footprint | None) -> bool:
    return footprint is not None and any(module.name == "lm_head.weight" for module in footprint.modules)


def _check_base_shards(release: Release, difference: ModelDiff, base_file_of: dict[str, str]) -> Iterator[Finding]:
    """No file of the base that holds a weight that changed may be among the files."""
    changed = {base_file_of[tensor.name] for tensor in difference.tensors if tensor.changed_parameters}
    hashes = {entry.sha256 for entry in difference.base_files if entry.path in changed}
    for path, file in release.files.items():
        if kind_of(path) == "weights" and file.sha256 in hashes:
            yield Finding("base-weights", path, "it is a file of the base with weights that were changed: remove it.")


def _check_footprint(measured: Footprint, stated: Footprint) -> Iterator[Finding]:
    def differs(one: float, other: float) -> bool:
        return abs(one - other) > _RELATIVE_TOLERANCE * max(abs(one), abs(other))

    wrong = [
        name
        for name, is_wrong in (
            ("the number of changed parameters", measured.changed_parameters != stated.changed_parameters),
            ("the number of parameters", measured.total_parameters != stated.total_parameters),
            ("the relative norm", differs(measured.relative_norm, stated.relative_norm)),
            ("the largest change", differs(measured.max_abs, stated.max_abs)),
            # Under `sealed` the report has the sums alone
            (
                "which tensors changed",
                bool(stated.modules)
                and {module.name for module in measured.modules} != {module.name for module in stated.modules},
            ),
        )
        if is_wrong
    ]
    if wrong:
        message = f"the footprint is not that of these weights ({', '.join(wrong)}): write the report again."
        yield Finding("footprint", REPORT_NAME, message)
