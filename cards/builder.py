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
"""The card of a release and its pictures, written from the report that lies in the folder."""

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from hf_unlearn.cards.card import CARD_NAME, CardFigure, render_model_card
from hf_unlearn.cards.disclosure import apply_disclosure
from hf_unlearn.cards.file_names import kind_of
from hf_unlearn.cards.merge import merge_card
from hf_unlearn.cards.png import strip_png
from hf_unlearn.cards.report import REPORT_NAME, Disclosure, FileEntry, UnlearningReport, hash_files, write_bytes


FIGURES = {
    "footprint": "figures/footprint.png",
    "before_after": "figures/before_after.png",
    "attacks": "figures/attacks.png",
    "recovery": "figures/recovery_curves.png",
}

# What the report lists of a model
MODEL_KINDS = ("config", "index", "tokenizer", "weights")


def build_card(
    folder: str | os.PathLike,
    *,
    disclosure: Disclosure | None = None,
    commitment: str | None = None,
    model_name: str | None = None,
    license: str | Mapping[str, Any] | None = None,
    mode: Literal["new", "merge", "keep"] = "merge",
    repair: bool = False,
) -> list[str]:
    """
    Write the model card of a release from its report: `README.md`, pictures, and the report at the disclosure level.

    The report lists the model's files as they are then. Pictures need matplotlib (`pip install 'hf-unlearn[plots]'`);
    without it the card has the tables alone. Of an earlier card, no picture stays that this one does not have.

    Args:
        folder (`str` or `os.PathLike`):
            The release, with `unlearning_report.json`.
        disclosure (`str`, *optional*):
            `"public"`, `"category"`, `"count-only"` or `"sealed"`; defaults to the report's own level. The report in
            the folder is written anew at this level: what it loses is gone.
        commitment (`str`, *optional*):
            For `"sealed"`, from [`~hf_unlearn.cards.disclosure.commit_rows`].
        model_name (`str`, *optional*):
            Name of the released model, with which its numbers stand in the metadata.
        license (`str` or `Mapping`, *optional*):
            Identifier of the base model's licence, or the metadata that
            [`~hf_unlearn.cards.licence.inherit_licence`] took over. Left out where unset.
        mode (`str`, *optional*, defaults to `"merge"`):
            What becomes of a `README.md` that is there, as in [`~hf_unlearn.cards.merge.merge_card`]: `"merge"` keeps
            what a person wrote, below the generated part or around the markers of an earlier one; `"new"` puts the
            generated card in its place, and `"keep"` leaves it.
        repair (`bool`, *optional*, defaults to `False`):
            Whether to drop what is at fault in the metadata of a card that is there, instead of refusing it.

    Returns:
        `list[str]`: the files written, relative to the folder.

    Raises:
        `ValueError`: the report is not there or does not fit, the level says more than it holds, or the card that is
            there is malformed.

    Example:

    ```python
    >>> import tempfile
    >>> from hf_unlearn.cards import BaseModel, Data, DataSummary, Environment, UnlearningReport
    >>> from hf_unlearn.cards.builder import build_card
    >>> report = UnlearningReport(
    ...     tool_version="0.1.0",
    ...     base=BaseModel(None, None, "LlamaForCausalLM", "llama", 936448, "float32"),
    ...     method=None,
    ...     data=Data(DataSummary(rows=40, tokens=1203)),
    ...     environment=Environment("3.11.9", "Linux", {}, "cpu", 1, None),
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report.save(f"{folder}/unlearning_report.json")
    ...     build_card(folder)
    ['unlearning_report.json', 'README.md']

    ```
    """
    folder = Path(folder)
    report_path, card_path = folder / REPORT_NAME, folder / CARD_NAME
    if not report_path.is_file():
        raise ValueError(f"there is no {REPORT_NAME} in the folder: the trainer writes it when it saves the model")
    existing = card_path.read_bytes().decode("utf-8", errors="replace") if card_path.is_file() else None
    merge_card(existing, "# Title\n", mode, repair)  # refuses what it must before the first file is written
    report = UnlearningReport.load(report_path)
    report = apply_disclosure(report, disclosure or report.data.disclosure, commitment=commitment)
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file(follow_symlinks=False))
    # As they are now: the base's tokenizer files may have been put back, and RunRecordCallback writes the report
    # before the model is saved. A report that lies alone keeps its list.
    if model := [name for name in names if kind_of(name) in MODEL_KINDS]:
        report.files = hash_files(folder, model)
    notices = [name for name in names if kind_of(name) == "licence"]
    files = render_files(
        report,
        existing=existing,
        model_name=model_name,
        license=license,
        notices=notices,
        mode=mode,
        repair=repair,
    )
    for name in FIGURES.values():
        (folder / name).unlink(missing_ok=True)  # of an earlier card
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_bytes(folder / name, content)
    return list(files)


def render_files(
    report: UnlearningReport,
    *,
    existing: str | None = None,
    model_name: str | None = None,
    license: str | Mapping[str, Any] | None = None,
    notices: Sequence[str] = (),
    mode: Literal["new", "merge", "keep"] = "merge",
    repair: bool = False,
) -> dict[str, bytes]:
    """
    What [`build_card`] writes, without a folder: the report, the card and its pictures.

    Args:
        report ([`UnlearningReport`]):
            At its level of disclosure. Its list of files gets the pictures.
        existing (`str`, *optional*):
            The card that is there.
        model_name, license, mode, repair:
            As in [`build_card`].
        notices (`Sequence[str]`, *optional*):
            Files of the base's licence beside the card.

    Returns:
        `dict[str, bytes]`: path -> content.

    Raises:
        `ValueError`: the card that is there is malformed.
    """
    pictures = _draw(report)
    figures = {name: CardFigure(FIGURES[name], text) for name, (text, _) in pictures.items()}
    contents = {FIGURES[name]: content for name, (_, content) in pictures.items()}
    report.files = [file for file in report.files if file.path not in FIGURES.values()]
    report.files += [
        FileEntry(path, len(content), hashlib.sha256(content).hexdigest()) for path, content in contents.items()
    ]
    card = render_model_card(report, model_name=model_name, license=license, notices=notices, figures=figures)
    return {
        REPORT_NAME: report.to_json().encode("utf-8"),
        CARD_NAME: merge_card(existing, card, mode, repair).encode("utf-8"),
        **contents,
    }


def _draw(report: UnlearningReport) -> dict[str, tuple[str, bytes]]:
    """Name, alternative text and PNG of each picture that there is something to draw for."""
    from hf_unlearn.cards import figures

    if not figures.can_draw():
        return {}
    kinds: dict[str, tuple[Callable[..., bool], Callable[[UnlearningReport], str]]] = {
        "footprint": (figures.draw_footprint, figures.describe_footprint),
        "before_after": (figures.draw_before_after, figures.describe_before_after),
        "attacks": (figures.draw_heat_map, figures.describe_heat_map),
        "recovery": (figures.draw_recovery_curves, figures.describe_recovery_curves),
    }
    pictures = {}
    for name, (draw, describe) in kinds.items():
        file = io.BytesIO()
        if draw(report, file):
            pictures[name] = describe(report), strip_png(file.getvalue())
    return pictures
