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
from collections.abc import Iterable, Iterator
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
# From the most that is said of the data to the least
Disclosure = Literal["public", "category", "count-only", "sealed"]
# Letters alone: no number, and no room for a sentence
TopicLabel = Annotated[
    str, re.compile(r"(?=.{2,40}\Z)[a-z]+(-[a-z]+){0,3}"), "a topic of up to four words in small letters, with hyphens"
]
Bucket = Literal["1-9", "10-99", "100-999", "1000-9999", "10000 or more"]
ReferenceKind = Literal["adapter_disabled", "initial_weights", "separate_model"]
# What is to go, what is to stay, the two sets of common knowledge that model utility is measured on as well, the
# prompts that should and should not be refused, and the tasks of lm-evaluation-harness.
SetName = Literal["forget", "retain", "real_authors", "world_facts", "harmful", "harmless", "harness"]


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
    reference: ReferenceKind | None
    settings: dict[Name, float | int | str | bool | None]
    seed: int
    steps: int
    checkpoint: str = "last step"


@dataclass
class Benchmark:
    """A public data set, named under the level `public` only. `config` and `revision` are `None` where it has none."""

    dataset_id: HubId
    config: Name | None
    split: Name
    revision: Revision | None


@dataclass
class Topic:
    """
    What some of the rows are about, and roughly how many: under `category` and `public` only. The labels of
    [`~hf_unlearn.cards.disclosure.TOPICS`] say the same to every reader; any other is letters and hyphens.
    """

    label: TopicLabel
    rows: Bucket


@dataclass
class DataSummary:
    """
    How much data there was; from the level `category` on what it is about, under `public` which data set it is.
    Nothing here can hold a row of it. `None` is an amount that is not known.
    """

    rows: int | None
    tokens: int | None
    topics: list[Topic] = field(default_factory=list)
    benchmark: Benchmark | None = None


@dataclass
class Data:
    """
    The data, at the disclosure level. Under `sealed` there is a `commitment` to the forget set, and no counts; see
    [`~hf_unlearn.cards.disclosure.commit_rows`].
    """

    disclosure: Disclosure = field(default="count-only", kw_only=True)
    forget: DataSummary | None
    retain: DataSummary | None = None
    commitment: Sha256 | None = None


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
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """As [`write_text`]."""
    path = Path(path)
    # Not from `tempfile`: its files are readable by their owner alone, and would stay so.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
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
    report = validated(values, UnlearningReport, "")
    _check_disclosure(report)
    return report


def is_count(name: str) -> bool:
    """Whether a metric or a setting of an attack is a number of rows, or cannot be above one."""
    return re.fullmatch(r"(.*_)?(rows|samples)(_skipped|_left_out)?", name) is not None


def _check_disclosure(report: UnlearningReport) -> None:
    """Refuses what does not belong to the level: each says what may be there, and what must be."""
    level, data = report.data.disclosure, report.data
    if (data.commitment is None) == (level == "sealed"):
        raise ValueError(
            f"data.commitment: {'missing' if level == 'sealed' else 'not allowed'} under {level!r}: a commitment is "
            "what 'sealed' has, and no other level"
        )
    if level == "sealed":
        for name in _counts_of(report):
            raise ValueError(f"{name}: not allowed under 'sealed', which has no counts and no footprint of a module")
        return
    if data.forget is None:
        raise ValueError(f"data.forget: missing under {level!r}: 'sealed' alone has no counts")
    for name, summary in (("forget", data.forget), ("retain", data.retain)):
        if summary is None:
            continue
        if summary.topics and level == "count-only":
            raise ValueError(f"data.{name}.topics: not allowed under 'count-only': 'category' names topics")
        if summary.benchmark is not None and level != "public":
            raise ValueError(f"data.{name}.benchmark: not allowed under {level!r}: 'public' names a data set")
    if level == "category" and not data.forget.topics:
        raise ValueError("data.forget.topics: missing under 'category': name a topic, or use 'count-only'")
    if level == "public" and data.forget.benchmark is None:
        raise ValueError("data.forget.benchmark: missing under 'public': name the data set, or use 'count-only'")


def _counts_of(report: UnlearningReport) -> Iterator[str]:
    """Where a report has what `sealed` leaves out."""
    if report.data.forget is not None:
        yield "data.forget"
    if report.data.retain is not None:
        yield "data.retain"
    if report.footprint is not None and report.footprint.modules:
        yield "footprint.modules"
    for when, sets in vars(report.metrics).items():
        for name, values in sets.items():
            yield from (f"metrics.{when}.{name}.{metric}" for metric in values if is_count(metric))
    for place, attack in enumerate(report.attacks):
        for part in ("budget", "tried"):
            yield from (f"attacks[{place}].{part}.{name}" for name in getattr(attack, part) if is_count(name))
        if attack.axis is not None and is_count(attack.axis):
            yield f"attacks[{place}].axis"
    if report.certificates:
        yield "certificates"
