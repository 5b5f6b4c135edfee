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
"""A generated card and the card that is there: what the user wrote stays, what must be true is the generated one's."""

import re
from typing import Any, Literal

from hf_unlearn.cards.markdown_rules import BEGIN_MARKER, END_MARKER, split_lines
from hf_unlearn.cards.metadata import metadata_problems, parse_card, split_card


# What is said of the released weights. The user's value goes even where the generated card has none: an old one would
# be about other weights, or name the data.
SAFETY_KEYS = ("base_model", "base_model_relation", "library_name", "datasets", "model-index")
# Replaced together where the generated card has a licence; else the user's stay.
LICENCE_KEYS = ("license", "license_name", "license_link")
# Tags that say of older weights what may not hold for these; PEFT writes local paths into the first.
_STALE_TAGS = ("base_model:", "dataset:", "unlearning-method:", "generated_from_")
_MARKER = re.compile(r"<!--\s*hf-unlearn:(begin|end)\b.*-->")
# Sentences by which a body is known as written by a program: all of one row have to be there.
_PROGRAMS = [
    ["<!-- This model card has been generated automatically according to the information the Trainer had access to"],
    ["<!-- This model card has been generated automatically according to the information Keras had access to"],
    [
        "# Model Card for ",
        "It has been trained using [TRL](https://github.com/huggingface/trl).",
        "### Framework versions",
    ],
    ["<!-- Provide a quick summary of what the model is/does. -->", "[More Information Needed]", "- PEFT "],
    [
        "<!-- Provide a quick summary of what the model is/does. -->",
        "This is the model card of a 🤗 transformers model",
    ],
    ["Every number here is rendered from `unlearning_report.json`"],
]


def mark(generated: str) -> str:
    """
    Put the body of a generated card between the markers by which the next merge finds it.

    Args:
        generated (`str`):
            A card, as [`~hf_unlearn.cards.card.render_model_card`] gives it.

    Returns:
        `str`: The card; one that has the markers already comes back as it is.

    Raises:
        `ValueError`: It has markers that do not fit together.

    Example:

    ```python
    >>> from hf_unlearn.cards.merge import mark
    >>> print(mark("---\\nlicense: mit\\n---\\n\\n# Title\\n"), end="")
    ---
    license: mit
    ---
    <!-- hf-unlearn:begin v1 -->
    <BLANKLINE>
    # Title
    <BLANKLINE>
    <!-- hf-unlearn:end -->

    ```
    """
    front, body = _split(generated)
    if _find_markers(body):
        return generated
    return f"{front}{_block(body)}\n"


def merge_card(
    existing: str | None, generated: str, mode: Literal["new", "merge", "keep"] = "merge", repair: bool = False
) -> str:
    """
    Merge a generated card into the card that a repository has.

    The user's text outside the markers is kept byte for byte. A card without markers keeps all of its body, below
    the generated part, unless a program wrote it (the Trainer, TRL, PEFT, hf-unlearn): then it is replaced. Of the
    metadata the user's wins, except for `SAFETY_KEYS`, the licence where the generated card has one, and tags, which
    are united.
    Merging a second time changes nothing.

    Args:
        existing (`str`, *optional*):
            The card that is there; `None` where there is none. Read it with `newline=""`, so that no line end changes.
        generated (`str`):
            The generated card, with or without markers.
        mode (`str`, *optional*, defaults to `"merge"`):
            `"new"` gives the generated card, `"keep"` the existing one where there is one.
        repair (`bool`, *optional*, defaults to `False`):
            Drop what is at fault in the metadata of the existing card, instead of refusing it.

    Returns:
        `str`: The card to write.

    Raises:
        `ValueError`: The existing card is malformed; the message names the key or the line.

    Example:

    ```python
    >>> from hf_unlearn.cards.merge import merge_card
    >>> card = merge_card("---\\nlanguage: en\\n---\\n# Mine\\n", "---\\nbase_model: org/name\\n---\\n# Generated\\n")
    >>> print(card, end="")
    ---
    language: en
    base_model: org/name
    ---
    <!-- hf-unlearn:begin v1 -->
    # Generated
    <BLANKLINE>
    <!-- hf-unlearn:end -->
    <BLANKLINE>
    # Mine

    ```
    """
    if mode not in ("new", "merge", "keep"):
        raise ValueError("The card mode has to be one of new, merge and keep.")
    if mode == "keep" and existing is not None:
        return existing
    generated = mark(generated)
    if mode != "merge" or existing is None or not existing.strip():
        return generated
    own, own_body = parse_card(generated)
    own_start, own_end = _find_markers(own_body)
    block = own_body[own_start:own_end]
    theirs, front, body = _read_existing(existing, repair)
    merged = _merge_metadata(theirs, own)
    # Untouched metadata keeps its comments and quotes
    if front is None or list(merged.items()) != list(theirs.items()):
        front = f"---\n{_dump(merged)}---\n" if merged else ""
    markers = _find_markers(body)
    if markers:
        start, end = markers
        return f"{front}{body[:start]}{block}{body[end:]}"
    if not body.strip() or is_generated(body):
        return f"{front}{block}\n"
    return f"{front}{block}\n\n{body}"


def is_generated(body: str) -> bool:
    """
    Whether the body of a card was written by a program, and not changed in the way that program asks for.

    Args:
        body (`str`):
            The card without front matter.
    """
    return any(all(sentence in body for sentence in sentences) for sentences in _PROGRAMS)


def own_text(card: str) -> str:
    """
    What a person wrote in the body of a card: all outside the markers, or all of it where no program wrote it.

    Args:
        card (`str`):
            A card with or without markers.

    Returns:
        `str`: Without the space around it; empty where all was generated.

    Raises:
        `ValueError`: The card is malformed.
    """
    body = _split(card)[1]
    markers = _find_markers(body)
    if markers:
        start, end = markers
        return f"{body[:start].strip()}\n\n{body[end:].strip()}".strip()
    return "" if is_generated(body) else body.strip()


def _split(card: str) -> tuple[str, str]:
    """The front matter with its fences, and the body."""
    _, _, body = split_card(card)
    return card[: len(card) - len(body)], body


def _block(body: str) -> str:
    return f"{BEGIN_MARKER}\n{body}" + ("" if body.endswith("\n") else "\n") + f"\n{END_MARKER}"


def _find_markers(body: str) -> tuple[int, int] | None:
    """Where the marked part begins and ends; `None` where there is none. What is in a code block is an example."""
    found, hidden = [], []
    for line in split_lines(body):
        text = line.text.rstrip()
        if _MARKER.fullmatch(text):
            (hidden if line.is_code else found).append((text, line.start))
    kinds = [text for text, _ in found]
    if any(kind not in (BEGIN_MARKER, END_MARKER) for kind in kinds):
        raise ValueError(
            "The card has a marker of another version of hf-unlearn: update hf-unlearn, or remove the line."
        )
    if not kinds:
        if hidden and (_open_fence(body) or is_generated(body)):
            raise ValueError("A code block of the card that is never closed holds the generated part: close it.")
        return None
    if kinds != [BEGIN_MARKER, END_MARKER]:
        wrong = {
            (BEGIN_MARKER,): "has the marker where the generated part begins, and none where it ends",
            (END_MARKER,): "has the marker where the generated part ends, and none where it begins",
            (END_MARKER, BEGIN_MARKER): "has the marker of the end before that of the beginning",
        }.get(tuple(kinds), "has the markers of the generated part more than once")
        raise ValueError(f"The card {wrong}: restore the pair, or remove all of them.")
    return found[0][1], found[1][1] + len(END_MARKER)


def _open_fence(body: str) -> bool:
    """Whether the last line is within a code block: then one more line would be, too."""
    return split_lines(f"{body}\nx")[-1].is_code


def _read_existing(existing: str, repair: bool) -> tuple[dict[str, Any], str | None, str]:
    """Metadata, front matter as it is (`None` where it has to be written again) and body of the user's card."""
    try:
        metadata, body = parse_card(existing)
    except ValueError as error:
        if not repair:
            raise ValueError(f"{error} To replace the front matter instead, repair the card.") from None
        try:
            body = _split(existing)[1]
        except ValueError:  # it is never closed: all of it is text
            body = existing.lstrip().removeprefix("---")
        return {}, None, body
    replaced = (*SAFETY_KEYS, *LICENCE_KEYS)
    problems = [(key, text) for key, text in metadata_problems(metadata) if key not in replaced]
    if problems and not repair:
        raise ValueError(
            f"The metadata of the card there is not valid: {problems[0][1]} Correct it, or repair the card."
        )
    bad = {key for key, _ in problems} | {key for key, _ in metadata_problems(metadata) if key in LICENCE_KEYS}
    front = existing[: len(existing) - len(body)]
    return {key: value for key, value in metadata.items() if key not in bad}, None if bad else front, body


def _merge_metadata(theirs: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    replaced = (*SAFETY_KEYS, *(LICENCE_KEYS if "license" in own else ()))
    merged = {}
    for key, value in theirs.items():
        if key in replaced and key not in own:
            continue
        merged[key] = own[key] if key in replaced else value
    if "tags" in theirs:
        kept = [tag for tag in theirs["tags"] if not tag.startswith(_STALE_TAGS) or tag in own.get("tags", [])]
        merged["tags"] = list(dict.fromkeys([*kept, *own.get("tags", [])]))
        if not merged["tags"]:
            del merged["tags"]
    # No licence key of ours beside a licence that is theirs
    apart = LICENCE_KEYS if "license" in theirs and "license" not in own else ()
    return merged | {key: value for key, value in own.items() if key not in merged and key not in apart}


def _dump(metadata: dict[str, Any]) -> str:
    import yaml

    # No line folding, as in the generated card
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=float("inf"))
