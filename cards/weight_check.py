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
"""The weights of a release, compared with the base's: finite, changed, and as far from them as the report says."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from hf_unlearn.cards.diff import ModelDiff, diff_models
from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.findings import Finding
from hf_unlearn.cards.release import Release
from hf_unlearn.cards.report import REPORT_NAME, Footprint, UnlearningReport
from hf_unlearn.cards.tensor_files import INDEX_NAME, ModelFileError, ModelTensors, open_model


# How far a norm in the report may be from the one measured: it was summed in another order
_RELATIVE_TOLERANCE = 1e-3


def times_of_change(release: Release) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of the files that are held open."""
    statuses = {path: os.fstat(file.descriptor) for path, file in release.files.items() if file.descriptor >= 0}
    return {path: (status.st_size, status.st_mtime_ns) for path, status in statuses.items()}


@dataclass(frozen=True)
class ReadWeights:
    """
    The weights as they were read.

    Parameters:
        findings (`list[Finding]`): what was wrong with them.
        difference ([`~hf_unlearn.cards.diff.ModelDiff`], *optional*): to the base; `None` if they were not read.
        base_file_of (`dict[str, str]`): tensor -> file of the base that holds it.
        compared (`bool`): whether there was a base.
    """

    findings: list[Finding] = field(default_factory=list)
    difference: ModelDiff | None = None
    base_file_of: dict[str, str] = field(default_factory=dict)
    compared: bool = False


def read_weights(
    folder: str | os.PathLike,
    base: str | os.PathLike | None,
    release: Release,
    written: dict[str, tuple[int, int]],
    progress: Callable[[int], None],
) -> ReadWeights:
    """
    Reads all weights of a release, and of its base, once. The hashes of the files are those of what was read.

    Args:
        folder (`str` or `os.PathLike`): the release.
        base (`str` or `os.PathLike`, *optional*): folder of the base model.
        release ([`~hf_unlearn.cards.release.Release`]): the folder as it was read.
        written (`dict`): its [`times_of_change`] then.
        progress (`Callable[[int], None]`): told how many bytes were read.

    Raises:
        `ValueError`: the base cannot be read, or the two are of different architectures.
    """
    if not any(kind_of(path) == "weights" for path in release.files):
        return ReadWeights()
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
                now = times_of_change(release)
                changed = [path for path in model.files if now[path] != written[path]]
        except ModelFileError as error:
            # By a rule of its own: who lets that of a header through has not let through what was not looked at
            message = "they could not be read, so they were not compared: see what else was found."
            return ReadWeights([error.finding, Finding("weights-not-compared", "the weights", message)])
        if changed:
            message = "it changed while it was read: try again."
            return ReadWeights([Finding("changed-while-read", path, message) for path in changed])
        base_file_of = {} if other is None else {name: entry.file for name, entry in other.tensors.items()}
    for entry in difference.new_files:
        release.files[entry.path].sha256 = entry.sha256  # read whole just now: not once more
    return ReadWeights([], difference, base_file_of, base is not None)


def check_weights(release: Release, weights: ReadWeights, report: UnlearningReport | None) -> list[Finding]:
    """What the weights are: finite, other than the base's, and as far from them as the report says."""
    findings = list(weights.findings)
    if weights.difference is None:
        return findings
    if weights.difference.not_finite:
        findings.append(Finding("not-finite", "the weights", "they hold NaN or infinite values: nothing to release."))
    if weights.compared:
        findings += _check_difference(release, weights.difference, weights.base_file_of, report)
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
    # A head that was untied is in the release alone
    changed = {
        base_file_of[tensor.name]
        for tensor in difference.tensors
        if tensor.changed_parameters and tensor.name in base_file_of
    }
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
