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
"""The front matter of a card: read strictly, and checked without the Hub by the rules that its server has."""

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_unlearn.cards.config_rules import is_hub_id
from hf_unlearn.cards.findings import Finding


if TYPE_CHECKING:
    import yaml


MAX_FRONT_MATTER = 128 * 2**10
_MAX_DEPTH = 16
_MAX_NODES = 20_000
_FRONT_MATTER = re.compile(r"\s*---(?:\r\n|\r|\n)")
_CLOSING = re.compile(r"(?:\r\n|\r|\n|^)---[ \t]*(?:\r\n|\r|\n|\Z)")
_KEY = re.compile(r"[\w.-]{1,64}", re.ASCII)
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
# ISO 639-1. Codes of three letters are too many to list.
_LANGUAGES = set(
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee "
    "el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is "
    "it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms "
    "mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si "
    "sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh "
    "yi yo za zh zu code multilingual".split()
)
# The identifiers in https://huggingface.co/docs/hub/repositories-licenses
_LICENCES = set(
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode- "
    "openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 "
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc- "
    "by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl "
    "apple-amlr mpl-2.0 odc-by odbl open-mdw openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense "
    "zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 "
    "llama3.3 llama4 grok2-community gemma unknown other".split()
)


def parse_card(text: str) -> tuple[dict[str, Any], str]:
    """
    The front matter and the body of a card.

    The YAML is read as the Hub reads it, by version 1.2: `no` is a text, and so is a date. Aliases, tags and keys that
    stand twice are refused, and nothing is built that is larger than the text.

    Args:
        text (`str`):
            Content of a `README.md`.

    Returns:
        `tuple[dict, str]`: The metadata, empty where there is no front matter, and all that follows it, as it is.

    Raises:
        `ValueError`: The front matter cannot be read; the message names the line.

    Example:

    ```python
    >>> from hf_unlearn.cards.metadata import parse_card
    >>> parse_card("---\\nlicense: mit\\nlanguage: no\\n---\\n# Title\\n")
    ({'license': 'mit', 'language': 'no'}, '# Title\\n')

    ```
    """
    front, start, body = split_card(text)
    return ({}, body) if front is None else (_load(front, text.count("\n", 0, start) + 1), body)


def split_card(text: str) -> tuple[str | None, int, str]:
    """
    Where the front matter of a card is.

    Args:
        text (`str`):
            Content of a `README.md`.

    Returns:
        `tuple[str | None, int, str]`: The YAML (`None` where there is none), where it begins, and the body.

    Raises:
        `ValueError`: It is not closed.
    """
    opening = _FRONT_MATTER.match(text.removeprefix("\ufeff"))
    if not opening:
        return None, 0, text
    start = opening.end() + text.startswith("\ufeff")
    closing = _CLOSING.search(text, start - 1)
    if not closing:
        raise ValueError("The card opens its front matter with --- and never closes it: add a line --- after it.")
    if closing.start() < start:  # it is empty
        return "", start, text[closing.end() :]
    return text[start : closing.start()], start, text[closing.end() :]


def _load(front: str, first_line: int) -> dict[str, Any]:
    import yaml

    if len(front) > MAX_FRONT_MATTER:
        raise ValueError(f"The front matter is longer than {MAX_FRONT_MATTER:,} characters: move text to the body.")
    try:
        _check_events(front, first_line)
        value = yaml.load(front, Loader=_loader(first_line))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark else front.count("\n", 0, getattr(error, "position", 0))
        raise ValueError(
            f"Line {first_line + line} of the card is no valid YAML: correct its indentation, or quote its value."
        ) from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("The front matter of the card is no list of keys with values: write `key: value` lines.")
    return value


def _check_events(front: str, first_line: int) -> None:
    """What could make a small text large or deep, before anything is built."""
    import yaml

    depth = nodes = 0
    for event in yaml.parse(front, Loader=yaml.SafeLoader):
        line = f"Line {first_line + event.start_mark.line} of the card"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ValueError(f"{line} has an alias or an anchor: write the value out.")
        if getattr(event, "tag", None):
            raise ValueError(f"{line} has a YAML tag: write a plain value.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        nodes += isinstance(event, yaml.NodeEvent)
        if depth > _MAX_DEPTH or nodes > _MAX_NODES:
            raise ValueError(f"{line} is nested too deep, or the front matter holds too many values: shorten it.")


def _loader(first_line: int) -> type["yaml.SafeLoader"]:
    import yaml

    class Loader(yaml.SafeLoader):
        # Only what YAML 1.2 resolves: no sexagesimal or octal numbers, no yes and no, no dates, no merge keys
        yaml_implicit_resolvers = {}

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
            content = {}
            for key_node, value_node in node.value:
                line = f"Line {first_line + key_node.start_mark.line} of the card"
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise ValueError(f"{line} has a key that is no text: put it into quotes.")
                if key in content:
                    named = f"the key `{key}`" if _KEY.fullmatch(key) else "a key"
                    raise ValueError(f"{line} has {named} for the second time: remove one of them.")
                content[key] = self.construct_object(value_node, deep=True)
            return content

    def number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
        return int(node.value) if re.fullmatch("[-+]?[0-9]+", node.value) else float(node.value)

    def special(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
        return float(node.value.replace(".", ""))

    null, true = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"
    integer, real, odd = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "special"
    Loader.add_implicit_resolver(null, re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    Loader.add_implicit_resolver(true, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    # Eighteen digits fit into every reader's integer; what is longer, or begins with a zero, stays a text
    Loader.add_implicit_resolver(integer, re.compile("^[-+]?(0|[1-9][0-9]{0,17})$"), list("-+0123456789"))
    decimal = r"^[-+]?(\.[0-9]{1,99}|[0-9]{1,99}\.[0-9]{0,99}|[0-9]{1,99}(?=[eE]))([eE][-+]?[0-9]{1,9})?$"
    Loader.add_implicit_resolver(real, re.compile(decimal), list("-+0123456789."))
    Loader.add_implicit_resolver(odd, re.compile(r"^([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"), list("-+."))
    Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node))
    Loader.add_constructor("tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True))
    Loader.add_constructor(integer, number)
    Loader.add_constructor(real, number)
    Loader.add_constructor(odd, special)
    return Loader


def check_metadata(file: str, text: str) -> list[Finding]:
    """
    The front matter of a card as findings.

    Args:
        file (`str`):
            What the findings call it.
        text (`str`):
            Content of a `README.md`.

    Returns:
        `list[Finding]`: Rule `card-metadata`, one finding for each value at fault.
    """
    try:
        metadata, _ = parse_card(text)
    except ValueError as error:
        return [Finding("card-metadata", file, str(error))]
    return [Finding("card-metadata", file, message) for message in validate_metadata(metadata)]


def validate_metadata(metadata: dict[str, Any]) -> list[str]:
    """
    What the Hub would refuse in the metadata of a model card, and what its client cannot load.

    Args:
        metadata (`dict`):
            As [`parse_card`] gives it.

    Returns:
        `list[str]`: One sentence for each value at fault; it names the key, never the value. Empty where all is well.

    Example:

    ```python
    >>> from hf_unlearn.cards.metadata import validate_metadata
    >>> validate_metadata({"base_model": "./checkpoint", "widget": "text"})
    ['"base_model" is no id of the Hub: write org/name.', '"widget" has to be a list.']

    ```
    """
    return [message for _, message in metadata_problems(metadata)]


def metadata_problems(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """
    The same as [`validate_metadata`], with the top-level key that each sentence is about.

    Args:
        metadata (`dict`):
            As [`parse_card`] gives it.

    Returns:
        `list[tuple[str, str]]`: Key and sentence.
    """
    problems = []
    for key, value in metadata.items():
        if not isinstance(key, str):
            problems.append((key, "A key is no text: put it into quotes."))
            continue
        name = key if _KEY.fullmatch(key) else "a key"
        found = list(_plain(value, name)) or list(_CHECKS[key](value, key) if key in _CHECKS else ())
        problems += [(key, message) for message in found]
    if "base_model_relation" in metadata and "base_model" not in metadata:
        problems.append(("base_model_relation", '"base_model_relation" needs "base_model": add it, or remove both.'))
    return problems


def metadata_warnings(metadata: dict[str, Any]) -> list[str]:
    """
    What the Hub accepts and shows with a warning.

    Args:
        metadata (`dict`):
            As [`parse_card`] gives it, without anything that [`validate_metadata`] objects to.

    Returns:
        `list[str]`: One sentence each.
    """
    licences = metadata.get("license", [])
    licences = licences if isinstance(licences, list) else [licences]
    messages = []
    if any(not isinstance(licence, str) or licence not in _LICENCES for licence in licences):
        messages.append('"license" is no identifier that the Hub knows: write `other`, with "license_name".')
    if "other" in licences and "license_name" not in metadata:
        messages.append('"license" is `other` and has no name: add "license_name" and "license_link".')
    return messages


def _plain(value: Any, path: str, depth: int = 0) -> Iterator[str]:
    """Whether a value is made of what YAML has, with no null and no number that is none."""
    if value is None:
        yield f'"{path}" is null: give it a value, or remove it.'
    elif depth > _MAX_DEPTH:
        yield f'"{path}" is nested too deep.'
    elif isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            yield f'"{path}" has a key that is no text.'
        for key, item in value.items():
            known = isinstance(key, str) and _KEY.fullmatch(key)
            yield from _plain(item, f"{path}.{key if known else '?'}", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _plain(item, f"{path}[{index}]", depth + 1)
    elif type(value) is float:
        if not math.isfinite(value):
            yield f'"{path}" is no finite number.'
    elif type(value) not in (str, bool, int):
        # Such as a NumPy number, which YAML would write as a Python object
        yield f'"{path}" is a {type(value).__name__}: write a plain number or text.'


def _text(value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, str):
        yield f'"{path}" has to be a text.'
    elif not value.strip():
        yield f'"{path}" is not allowed to be empty.'


def _one_or_more(check: Any) -> Any:
    def check_all(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield from check(value, path)
        elif not value:
            yield f'"{path}" is not allowed to be empty.'
        else:
            for index, item in enumerate(value):
                yield from check(item, f"{path}[{index}]")

    return check_all


def _list_of(check: Any) -> Any:
    def check_all(value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f'"{path}" has to be a list.'
            return
        for index, item in enumerate(value):
            yield from check(item, f"{path}[{index}]")

    return check_all


def _hub_id(value: Any, path: str) -> Iterator[str]:
    problems = list(_text(value, path))
    yield from problems
    if not problems and not is_hub_id(value):
        yield f'"{path}" is no id of the Hub: write org/name.'


def _language(value: Any, path: str) -> Iterator[str]:
    known = isinstance(value, str) and (value in _LANGUAGES or re.fullmatch("[a-z]{3}", value))
    if not known:
        yield f'"{path}" is no ISO 639 code of two or three small letters: write such as en.'


def _relation(value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, str) or value not in _RELATIONS:
        yield f'"{path}" has to be one of {", ".join(_RELATIONS)}.'


def _licence_link(value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, str) or not re.fullmatch(r"https://\S+|[\w][\w.-]*", value):
        yield f'"{path}" is neither an https link nor the name of a file of the release.'


def _anything(value: Any, path: str) -> Iterator[str]:
    return iter(())


def _model_index(value: Any, path: str) -> Iterator[str]:
    if not isinstance(value, list):
        yield f'"{path}" has to be a list.'
        return
    for index, model in enumerate(value):
        at = f"{path}[{index}]"
        yield from _fields(model, at, {"name": _text, "results": _list_of(_result)})


def _result(value: Any, path: str) -> Iterator[str]:
    yield from _fields(value, path, {"task": _task, "dataset": _dataset, "metrics": _list_of(_metric)})


def _task(value: Any, path: str) -> Iterator[str]:
    yield from _fields(value, path, {"type": _text}, {"name": _text})


def _dataset(value: Any, path: str) -> Iterator[str]:
    optional = {"config": _text, "split": _text, "revision": _text}
    yield from _fields(value, path, {"name": _text, "type": _text}, optional)


def _metric(value: Any, path: str) -> Iterator[str]:
    yield from _fields(value, path, {"type": _text, "value": _number}, {"name": _text, "config": _text})


def _number(value: Any, path: str) -> Iterator[str]:
    # That it is finite, `_plain` saw
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        yield f'"{path}" has to be a number.'


def _fields(value: Any, path: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f'"{path}" has to be keys with values.'
        return
    for key in required:
        if key not in value:
            yield f'"{path}.{key}" is missing.'
    for key, check in {**required, **(optional or {})}.items():
        if key in value:
            yield from check(value[key], f"{path}.{key}")


_CHECKS = {
    "base_model": _one_or_more(_hub_id),
    "base_model_relation": _relation,
    "datasets": _one_or_more(_hub_id),
    "language": _one_or_more(_language),
    "library_name": _text,
    "license": _one_or_more(_text),
    "license_link": _licence_link,
    "license_name": _text,
    "metrics": _one_or_more(_text),
    "model-index": _model_index,
    "model_name": _text,
    "new_version": _hub_id,
    "pipeline_tag": _text,
    "tags": _list_of(_text),
    "widget": _list_of(_anything),
}
