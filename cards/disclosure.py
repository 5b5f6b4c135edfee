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
What a release says of the forget set: four levels, and the commitment of the strictest.

| level | what is said |
|---|---|
| `public` | which public data set it is, and all of the below |
| `category` | its topics with rough counts, and the amounts |
| `count-only` | the amounts: rows and tokens |
| `sealed` | a commitment: no amount, no footprint of a module |
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from hf_unlearn.cards.losses import LOSSES
from hf_unlearn.cards.report import Bucket, Disclosure, Topic, TopicLabel, UnlearningReport, is_count
from hf_unlearn.cards.validation import validated


LEVELS: tuple[str, ...] = get_args(Disclosure)

SALT_BYTES = 32

# Labels that mean the same to every reader. Others are allowed: they are the publisher's own words.
TOPICS = {
    "biography": "facts of people's lives",
    "biosecurity": "biology that can do harm",
    "books": "passages of books",
    "chemistry": "chemistry that can do harm",
    "code": "source code",
    "contact-data": "addresses, telephone numbers and the like",
    "copyright": "works under copyright",
    "credentials": "keys, passwords and the like",
    "cybersecurity": "attacks on computers",
    "fiction": "invented people and worlds",
    "health": "health of people",
    "hate": "hateful or harassing text",
    "legal": "law and proceedings",
    "news": "news articles",
    "personal-data": "data about persons",
    "sexual-content": "sexual text",
    "violence": "violent text",
    "weapons": "weapons",
}

# Hyperparameters that may be shown at every level: numbers and choices, nothing that names or holds data. Others, such
# as paths, data ids and word lists, stand in a report or a card under `public` alone.
SETTINGS = frozenset(
    # transformers
    "learning_rate lr_scheduler_type warmup_steps optim weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
    "per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps data_seed bf16 fp16 tf32 "
    "label_smoothing_factor neftune_noise_alpha group_by_length average_tokens_across_devices "
    "activation_checkpointing load_best_model_at_end "
    # TRL
    "max_length packing packing_strategy padding_free completion_only_loss assistant_only_loss loss_type loss_weights "
    "beta label_smoothing f_divergence_type reference_free disable_dropout precompute_ref_log_probs sync_ref_model "
    "ref_model_mixup_alpha ref_model_sync_steps desirable_weight undesirable_weight ld_alpha "
    # The losses
    "reference_mode simnpo_delta saturation_exponent importance_exponent adaptive_scale steering_coefficient "
    "hidden_layer circuit_breaker_layers pdu_initial_multiplier pdu_retain_threshold pdu_dual_step_size "
    "pdu_warmup_epochs "
    # What is to make forgetting hold
    "reference_noise_std reference_noise_layer sharpness sharpness_radius sharpness_weight sharpness_draws "
    "weight_averaging_start weight_averaging_every gradient_conflict retain_null_space probe_weight "
    "probe_weight_ratio probe_layer probe_pooling probe_held_out_accuracy latent_adversary_layers "
    "latent_adversary_radius latent_adversary_steps quantization_margin "
    # Constrained interventions
    "safe_region epsilon multiplier_step_size multiplier_interval retain_metric retain_damping relaxation radius "
    "relaxed_tokens attack_steps attack_restarts store aim probability top_k sequence_length temperature reserve "
    "positions num_fillers null_space_share rounds cut_rounds slack slack_cost".split()
)
# A choice such as `adamw_torch` or a list such as `4,8`: no blank, no slash
_CHOICE = re.compile(r"[A-Za-z0-9_.,:+@-]{1,60}")
# With the steps, the number of epochs gives the number of rows away
_GIVES_COUNTS_AWAY = ("num_train_epochs",)


def apply_disclosure(
    report: UnlearningReport, level: Disclosure, *, commitment: str | None = None
) -> UnlearningReport:
    """
    A copy of a report at another level. It only ever removes; the commitment of `sealed`, which cannot be made from a
    report, is the one thing that comes in.

    Args:
        report ([`UnlearningReport`]):
            At `level` or one at which more is said.
        level (`str`):
            `"public"`, `"category"`, `"count-only"` or `"sealed"`.
        commitment (`str`, *optional*):
            From [`commit_rows`]; for `"sealed"`, where the report has none.

    Returns:
        [`UnlearningReport`]: nothing in it is shared with `report`.

    Raises:
        `ValueError`: the level says more than the report holds, or the commitment is missing or has no place there.

    Example:

    ```python
    >>> from hf_unlearn.cards import BaseModel, Data, DataSummary, Environment, UnlearningReport
    >>> from hf_unlearn.cards.disclosure import apply_disclosure, commit_rows
    >>> report = UnlearningReport(
    ...     tool_version="0.1.0",
    ...     base=BaseModel(None, None, "LlamaForCausalLM", "llama", 936448, "float32"),
    ...     method=None,
    ...     data=Data(DataSummary(rows=40, tokens=1203)),
    ...     environment=Environment("3.11.9", "Linux", {}, "cpu", 1, None),
    ... )
    >>> commitment = commit_rows([{"question": "Who?", "answer": "Ada."}], salt=bytes(32))
    >>> apply_disclosure(report, "sealed", commitment=commitment).data.forget is None
    True

    ```
    """
    report = UnlearningReport.from_dict(report.to_dict())
    level = validated(level, Disclosure, "disclosure")
    data = report.data
    if LEVELS.index(level) < LEVELS.index(data.disclosure):
        raise ValueError(
            f"the report is at the disclosure level {data.disclosure!r}, and {level!r} says more than it holds: name "
            "what it says when the report is made"
        )
    if commitment is not None:
        if level != "sealed":
            raise ValueError(f"a commitment has no place under {level!r}: leave it out, or use 'sealed'")
        data.commitment = commitment
    data.disclosure = level
    for summary in filter(None, (data.forget, data.retain)):
        if level != "public":
            summary.benchmark = None
        if level not in ("public", "category"):
            summary.topics = []
    if report.method is not None:
        report.method.settings = visible_settings(report)
    if level == "sealed":
        seal(report)
    return UnlearningReport.from_dict(report.to_dict())


def seal(report: UnlearningReport) -> None:
    """
    Take out of a report, in place, what `sealed` leaves out: amounts, the footprint of each module, certificates.

    Args:
        report ([`UnlearningReport`]): with a commitment, or one that gets it.
    """
    report.data.forget = report.data.retain = None
    report.certificates = []  # they count prompts, tokens and constraints
    if report.footprint is not None:
        report.footprint.modules = []
    for stage in vars(report.metrics).values():
        for name, values in stage.items():
            stage[name] = {metric: value for metric, value in values.items() if not is_count(metric)}
    for attack in report.attacks:
        attack.budget = {name: value for name, value in attack.budget.items() if not is_count(name)}
        attack.tried = {name: values for name, values in attack.tried.items() if not is_count(name)}
        if attack.axis is not None and is_count(attack.axis):
            attack.axis, attack.curve = None, []


def visible_settings(report: UnlearningReport) -> dict[str, float | int | str | bool | None]:
    """
    The hyperparameters that a report may show at its level: under `public` all, else those of `SETTINGS`.

    Args:
        report ([`UnlearningReport`]): with a method.

    Returns:
        `dict`: in their order.
    """
    level, settings = report.data.disclosure, report.method.settings
    if level == "public":
        return dict(settings)
    return {
        name: value
        for name, value in settings.items()
        if is_shown(name, value) and not (level == "sealed" and name in _GIVES_COUNTS_AWAY)
    }


def is_shown(name: str, value: Any) -> bool:
    """
    Whether a hyperparameter may be shown at every level.

    Args:
        name (`str`): of the setting; that of a loss may stand before it.
        value: what it is set to.

    Returns:
        `bool`

    Example:

    ```python
    >>> from hf_unlearn.cards.disclosure import is_shown
    >>> is_shown("learning_rate", 1e-5), is_shown("npo_beta", 0.1), is_shown("dataset_name", "org/name")
    (True, True, False)

    ```
    """
    known = name in SETTINGS or any(name.removeprefix(f"{loss}_") in SETTINGS for loss in LOSSES)
    if isinstance(value, str):
        return known and _CHOICE.fullmatch(value) is not None
    return known and (value is None or isinstance(value, (bool, int, float)))


def bucket(rows: int) -> Bucket:
    """
    A rough count.

    Args:
        rows (`int`): at least 1.

    Example:

    ```python
    >>> from hf_unlearn.cards.disclosure import bucket
    >>> bucket(40), bucket(12345)
    ('10-99', '10000 or more')

    ```
    """
    if rows < 1:
        raise ValueError(f"a topic has at least one row, got {rows}: leave it out")
    return get_args(Bucket)[min(len(str(rows)), 5) - 1]


def count_topics(labels: Iterable[str]) -> list[Topic]:
    """
    The topics of a data set with rough counts, from one label for each row.

    Args:
        labels (`Iterable[str]`): see `TOPICS`; the label of each row.

    Returns:
        `list[Topic]`: by label, so that the order says nothing of the rows.

    Raises:
        `ValueError`: a label is no plain one. It is not repeated.

    Example:

    ```python
    >>> from hf_unlearn.cards.disclosure import count_topics
    >>> count_topics(["health"] * 12 + ["biography"])
    [Topic(label='biography', rows='1-9'), Topic(label='health', rows='10-99')]

    ```
    """
    counts = Counter(validated(label, TopicLabel, "a topic") for label in labels)
    return [Topic(label, bucket(rows)) for label, rows in sorted(counts.items())]


def commit_rows(rows: Iterable[Mapping[str, Any]], salt: bytes) -> str:
    """
    Commit to a forget set without saying anything of it.

    One HMAC-SHA256, with the salt as its key, over the canonical row set: each row as JSON with sorted keys and
    without blanks, in UTF-8, without duplicates and in byte order, each after its length as 8 bytes. Whoever holds the
    rows and the salt can check it; without the salt, short rows cannot be guessed and tried.

    Args:
        rows (`Iterable[Mapping[str, Any]]`):
            The forget set: dictionaries of JSON values. Neither their order nor repeated rows matter.
        salt (`bytes`):
            32 bytes from [`new_salt`], fresh for each release, never published.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        `ValueError`: the salt has another length, or a row has values that are not JSON.

    Example:

    ```python
    >>> from hf_unlearn.cards.disclosure import commit_rows, verify_commitment
    >>> rows = [{"question": "Who?", "answer": "Ada."}, {"question": "Where?", "answer": "7 Elm Row."}]
    >>> commitment = commit_rows(rows, salt=bytes(32))
    >>> verify_commitment(rows[::-1], bytes(32), commitment), verify_commitment(rows[:1], bytes(32), commitment)
    (True, False)

    ```
    """
    if len(salt) != SALT_BYTES:
        raise ValueError(f"the salt has {len(salt)} bytes and not {SALT_BYTES}: make one with new_salt")
    digest = hmac.new(salt, digestmod=hashlib.sha256)
    for row in sorted({_canonical(number, row) for number, row in enumerate(rows)}):
        digest.update(len(row).to_bytes(8, "big") + row)
    return digest.hexdigest()


def _canonical(number: int, row: Mapping[str, Any]) -> bytes:
    if not isinstance(row, Mapping) or not all(isinstance(key, str) for key in row):
        raise ValueError(f"row {number} is no mapping with text as its keys: give rows as dictionaries")
    try:
        text = json.dumps(dict(row), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError, RecursionError):
        # Not from the error, which may repeat what it is about
        raise ValueError(f"row {number} holds what is no JSON value: give text, numbers and lists of them") from None


def verify_commitment(rows: Iterable[Mapping[str, Any]], salt: bytes, commitment: str) -> bool:
    """
    Check a commitment.

    Args:
        rows (`Iterable[Mapping[str, Any]]`): the forget set.
        salt (`bytes`): the one that the publisher kept.
        commitment (`str`): what the report says.

    Returns:
        `bool`: whether the commitment was made to exactly these rows with this salt.
    """
    return hmac.compare_digest(commit_rows(rows, salt).encode(), commitment.encode())


def new_salt(path: str | os.PathLike, release: str | os.PathLike) -> bytes:
    """
    Draw the salt of a commitment, and keep it in a file that its owner alone can read.

    Args:
        path (`str` or `os.PathLike`): a new file outside `release`. Who loses it can prove nothing, who publishes it
            gives short rows away.
        release (`str` or `os.PathLike`): the folder that is released.

    Returns:
        `bytes`: 32 random bytes.

    Raises:
        `ValueError`: the file lies in the release folder, or exists already.
    """
    path = Path(path)
    if path.resolve().is_relative_to(Path(release).resolve()):
        raise ValueError("the salt must not lie in the folder that is released: name a file elsewhere")
    salt = secrets.token_bytes(SALT_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise ValueError("the file for the salt exists already: each release has a salt of its own") from None
    with open(descriptor, "wb") as file:
        file.write(salt)
        file.flush()
        os.fsync(descriptor)
    return salt


def load_salt(path: str | os.PathLike) -> bytes:
    """
    Read a salt that [`new_salt`] kept.

    Args:
        path (`str` or `os.PathLike`): the file.

    Raises:
        `ValueError`: it holds something else, or others can read it.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size != SALT_BYTES:
            raise ValueError(f"the salt is no file of {SALT_BYTES} bytes: name the one that was made for the release")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise ValueError("others can read the salt: take their rights away (chmod 600)")
        return file.read()
