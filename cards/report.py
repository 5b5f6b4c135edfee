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
"""The unlearning report: what was done, measured and released, in the one file that all else is rendered from."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from hf_unlearn.cards.validation import validated


SCHEMA_VERSION = 1
REPORT_NAME = "unlearning_report.json"

# Text with a rule: the pattern that a value must match as a whole, and what a message calls it. The rules leave no
# room for prose, so that no key can carry a row of the forget set, and a base model can never be an absolute path.
Name = Annotated[str, re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,99}"), "a plain name (letters, digits, _ . @ + -)"]
# Longer, because all losses and wrappers may stand in it
MethodName = Annotated[
    str, re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,299}"), "a plain name (letters, digits, _ . @ + -)"
]
HubId = Annotated[
    str,
    re.compile(r"(?!.*(--|\.\.))(\w[\w.-]*/)?\w([\w.-]{0,94}\w)?", re.ASCII),
    "a Hub id such as 'org/name', never a path",
]
Revision = Annotated[str, re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII), "a commit, tag or branch"]
RelativePath = Annotated[
    str,
    re.compile(r"(?!(.*/)?\.{1,2}(/|$))[^/\\:]+(/[^/\\:]+)*"),
    "a relative path with forward slashes and without '..'",
]
Sha256 = Annotated[str, re.compile(r"[0-9a-f]{64}"), "64 hexadecimal digits"]
# What is to go, what is to stay, the two sets of common knowledge that model utility is measured on as well, and the
# prompts that should and should not be refused.
SetName = Literal["forget", "retain", "real_authors", "world_facts", "harmful", "harmless"]


@dataclass
class BaseModel:
    """
    The model that was unlearned, or the one that was measured where no method is on record. `model_id` is a Hub id; a
    model that came from a folder has none.
    """

    model_id: HubId | None
    revision: Revision | None
    architecture: str
    model_type: str
    parameters: int
    dtype: str


@dataclass
class LossTerm:
    """
    One loss and its weight in the sum. `circuit_breaker` and `probe` have a schedule, a factor on that weight. Where
    the settings have a `probe_weight_ratio`, the weight of `probe` is that ratio.
    """

    name: Name
    weight: float


@dataclass
class Scope:
    """Which weights could move. `layers` is the range as configured, such as `"5-7"`."""

    kind: Literal["lora", "peft", "selected", "full"]
    modules: list[str]
    layers: str | None
    trainable_parameters: int
    rank: int | None


@dataclass
class Method:
    """
    How the model was unlearned. `name` has the losses, and after an `@` each what was to make forgetting hold.
    `settings` is an allow-list of hyperparameters, filled by the trainer.
    """

    name: MethodName
    forget_losses: list[LossTerm]
    retain_losses: list[LossTerm]
    scope: Scope
    reference: Literal["adapter_disabled", "initial_weights", "separate_model"] | None
    settings: dict[Name, float | int | str | bool | None]
    seed: int
    steps: int
    checkpoint: str = "last step"


@dataclass
class DataSummary:
    """How much data there was. Nothing here can hold the data, its name or its topic."""

    rows: int
    tokens: int


@dataclass
class Data:
    """The data, at the disclosure level."""

    disclosure: Literal["count-only"] = field(default="count-only", kw_only=True)
    forget: DataSummary
    retain: DataSummary | None = None


@dataclass
class ModuleFootprint:
    """How far one tensor moved: `‖Δ‖/‖W‖`, `max |Δ|`, and how many of its parameters changed."""

    name: str
    relative_norm: float
    max_abs: float
    changed_parameters: int
    parameters: int


@dataclass
class Footprint:
    """How far the model moved. `modules` lists the changed tensors only."""

    changed_parameters: int
    total_parameters: int
    relative_norm: float
    max_abs: float
    modules: list[ModuleFootprint]


@dataclass
class Metrics:
    """
    Evaluation before and after, and of a model that never saw the forget set (`control`): set -> metric -> value, the
    number of rows under the key `"rows"`, the ends of the 95 % interval of a metric under its name with `_ci_low` and
    `_ci_high`.
    """

    before: dict[SetName, dict[Name, float]] = field(default_factory=dict)
    after: dict[SetName, dict[Name, float]] = field(default_factory=dict)
    control: dict[SetName, dict[Name, float]] = field(default_factory=dict)


@dataclass
class CurvePoint:
    """The forget score of each model at one value of the setting that an attack's curve runs over."""

    at: float
    unlearned: float
    original: float | None
    control: float | None


@dataclass
class AttackResult:
    """
    What one attack brought back. `reason` says why `recovered` or a score is null.

    `budget` are the settings of the attacker's best trial, of `trials` in all; `tried` has the values of each setting
    that differed between them. `curve` runs over the setting `axis`, the best of the others at each point. `seconds`
    is what the attack on the unlearned model took.
    """

    name: Name
    budget: dict[Name, float | int | str]
    recovered: float | None
    control: str
    score_before: float | None
    score_after: float | None
    score_original_attacked: float | None
    score_control_attacked: float | None
    utility_after: float | None
    reason: str | None = None
    seed: int = 0
    trials: int = 0
    tried: dict[Name, list[float | int | str]] = field(default_factory=dict)
    axis: Name | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float | None = None


@dataclass
class Rule:
    """One threshold, what was measured, and whether it holds; `None` where nothing was measured."""

    name: Name
    bound: float
    measured: float | None
    holds: bool | None


@dataclass
class Verdict:
    """
    The outcome that the thresholds, declared before the first attack, give by rule.

    `missing` are the required attacks and measurements that there are none of; `not_run` are all attacks that were not
    run, required or not.
    """

    outcome: Literal["suppressed", "not_suppressed", "comes_back", "utility_lost", "gibberish", "undecided"]
    rules: list[Rule]
    missing: list[str]
    not_run: list[Name]
    thresholds_sha256: Sha256


@dataclass
class Certificate:
    """A bound that holds for certain, and the limits within which it does."""

    name: Name
    values: dict[Name, float | int | str]
    limits: str


@dataclass
class Environment:
    """Where the run took place."""

    python: str
    platform: str
    packages: dict[Name, str]
    device: str
    processes: int
    train_seconds: float | None


@dataclass
class FileEntry:
    """One released file."""

    path: RelativePath
    size: int
    sha256: Sha256


@dataclass
class UnlearningReport:
    """
    The content of `unlearning_report.json`.

    Fields may be set one by one while a run goes on. [`~UnlearningReport.to_dict`], [`~UnlearningReport.save`],
    [`~UnlearningReport.from_dict`] and [`~UnlearningReport.load`] all check every field against its type: numbers
    become plain `float` (NumPy and PyTorch scalars are fine), and a `ValueError` names the first field that is wrong.

    Parameters:
        schema_version (`int`, *optional*, defaults to `1`): Version of this schema.
        tool_version (`str`): Version of hf-unlearn that made the report.
        base ([`BaseModel`]): The model that was unlearned.
        method ([`Method`], *optional*): Losses, scope, settings, seed and steps. `None` for a model that was measured
            and whose making is not on record.
        data ([`Data`]): The data, at the disclosure level.
        footprint ([`Footprint`], *optional*): How far the weights moved.
        metrics ([`Metrics`], *optional*): Evaluation before and after.
        attacks (`list[AttackResult]`, *optional*): Attacks that were run, failures included.
        verdict ([`Verdict`], *optional*): What the thresholds say of it.
        certificates (`list[Certificate]`, *optional*): Bounds that hold for certain.
        environment ([`Environment`]): Where the run took place.
        files (`list[FileEntry]`, *optional*): The released files. The model card is rendered from the report, so
            neither of the two can be listed here.

    Example:

    ```python
    >>> from hf_unlearn.cards import BaseModel, Data, DataSummary, Environment, LossTerm, Method, Scope
    >>> from hf_unlearn.cards import UnlearningReport

    >>> report = UnlearningReport(
    ...     tool_version="0.1.0",
    ...     base=BaseModel("org/name", None, "LlamaForCausalLM", "llama", 936448, "float32"),
    ...     method=Method(
    ...         name="npo",
    ...         forget_losses=[LossTerm("npo", 1.0)],
    ...         retain_losses=[],
    ...         scope=Scope("full", [], None, 936448, None),
    ...         reference="initial_weights",
    ...         settings={"beta": 0.1},
    ...         seed=0,
    ...         steps=60,
    ...     ),
    ...     data=Data(DataSummary(rows=40, tokens=1203)),
    ...     environment=Environment("3.11.9", "Linux", {"torch": "2.13.0"}, "cpu", 1, 12.5),
    ... )
    >>> report.metrics.after["forget"] = {"probability": 0.0123, "rows": 40}
    >>> report.to_dict()["metrics"]["after"]
    {'forget': {'probability': 0.0123, 'rows': 40.0}}
    >>> report.metrics.after["forget"]["probability"] = float("nan")
    >>> report.to_dict()
    Traceback (most recent call last):
        ...
    ValueError: metrics.after.forget.probability: expected a finite number, got nan

    ```
    """

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    tool_version: str
    base: BaseModel
    method: Method | None
    data: Data
    footprint: Footprint | None = None
    metrics: Metrics = field(default_factory=Metrics)
    attacks: list[AttackResult] = field(default_factory=list)
    verdict: Verdict | None = None
    certificates: list[Certificate] = field(default_factory=list)
    environment: Environment = field(kw_only=True)
    files: list[FileEntry] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the checked report as plain JSON values, keys in schema order."""
        return asdict(_validated_report(self))

    def to_json(self) -> str:
        """Return the text that [`~UnlearningReport.save`] writes."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike) -> None:
        """Write the report in one step: a reader of `path` sees the old file or the new one, never half of one."""
        write_text(path, self.to_json())

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "UnlearningReport":
        """Build a report from the content of a JSON file: every key of the schema and no other, at every level."""
        return _validated_report(content)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "UnlearningReport":
        """Read a report. What does not fit raises a one-line `ValueError` that begins with the file's name."""
        path = Path(path)
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name}: not a JSON file") from error
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


def hash_files(folder: str | os.PathLike, names: Iterable[str]) -> list[FileEntry]:
    """
    Measure and hash files for the report.

    Args:
        folder (`str` or `os.PathLike`):
            The folder that is released.
        names (`Iterable[str]`):
            Paths relative to `folder`, with forward slashes.

    Returns:
        `list[FileEntry]`: One entry per name, in the order given.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hf_unlearn.cards import hash_files

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text("{}")
    ...     [entry] = hash_files(folder, ["config.json"])
    >>> entry.size, entry.sha256[:8]
    (2, '44136fa3')

    ```
    """
    entries = []
    for name in names:
        name = validated(name, RelativePath, "name")
        with open(Path(folder, name), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            # Of the open file, so that size and hash are those of the same bytes.
            entries.append(FileEntry(name, os.fstat(file.fileno()).st_size, digest))
    return entries


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to a new file beside `path`, then put it in its place: `path` never holds half of it."""
    path = Path(path)
    # Not from `tempfile`: its files are readable by their owner alone, and would stay so.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _validated_report(content: Any) -> UnlearningReport:
    values = vars(content) if isinstance(content, UnlearningReport) else content
    # The version comes first: keys that a newer schema added are no reason to complain about keys.
    if isinstance(values, dict) and "schema_version" in values:
        version = validated(values["schema_version"], int, "schema_version")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"this report has schema version {version}; this hf-unlearn reads up to {SCHEMA_VERSION}: "
                "upgrade hf-unlearn"
            )
        if version < 1:
            raise ValueError(f"schema_version: expected 1 to {SCHEMA_VERSION}, got {version}")
    return validated(values, UnlearningReport, "")
