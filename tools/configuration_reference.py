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
Writes docs/configuration.md from the dataclasses: `python tools/configuration_reference.py`, `--check` to compare.

The text is that of the docstrings, and the defaults are those of the fields, so that neither is typed twice.
"""

import argparse
import dataclasses
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from hf_unlearn import InterventionConfig, UnlearnConfig
from hf_unlearn.cli.inputs import DataArguments
from hf_unlearn.cli.running import RunArguments


PATH = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Written by tools/configuration_reference.py from the dataclasses: change those, and run it again. -->

Every option, its type and its default. An option is a field of `UnlearnConfig` or `InterventionConfig` in Python, a
flag of `hf-unlearn train` or `hf-unlearn intervene` (`--learning_rate 1e-5`; hyphens are as good), and a key of the
YAML file that `--config` reads; flags win over the file. All options of
[`transformers.TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) work as well, and on
the command line those of TRL's [`ModelConfig`](https://huggingface.co/docs/trl/script_utils) (`--use_peft`,
`--lora_r`, `--dtype`, ...). A name that is not known is refused, with the nearest one that is.
"""

CLASSES = [
    (UnlearnConfig, "`UnlearnConfig`: `hf-unlearn train`"),
    (InterventionConfig, "`InterventionConfig`: `hf-unlearn intervene`"),
    (DataArguments, "Data, on the command line of both"),
    (RunArguments, "The run, on the command line of both"),
]


class Option(NamedTuple):
    """An option: section of the docstring, name, type, default as it is written there, and text."""

    section: str
    name: str
    type: str
    default: str | None
    text: str


def read_options(cls: type) -> list[Option]:
    """The options that a docstring describes."""
    lines = textwrap.dedent(cls.__doc__.split("\n", 1)[1]).splitlines()
    start = lines.index("Parameters:") + 1
    options: list[Option] = []
    section = ""
    for line in lines[start:]:
        head = re.fullmatch(r"    (\w+) \((.+)\):", line)
        if line and not line.startswith("    "):
            break  # a note below
        if line.startswith("    > "):
            section = line.removeprefix("    > ")
        elif head is not None:
            kind, _, default = head[2].partition(", *optional*")
            written = re.search(r"defaults to `(.+)`", default)
            options.append(
                Option(section, head[1], kind.strip("`").replace("` or `", " or "), written and written[1], "")
            )
        elif line.strip():
            options[-1] = options[-1]._replace(text=f"{options[-1].text} {line.strip()}".strip())
    return options


def default_of(field: dataclasses.Field) -> str:
    """The default of a field, as Python writes it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return repr(value).replace("'", '"')


def own_fields(cls: type) -> dict[str, dataclasses.Field]:
    """Fields that hf-unlearn declares, without those whose default alone differs from transformers'."""
    names = {name for base in cls.__mro__ if base.__module__.startswith("hf_unlearn") for name in base.__annotations__}
    return {field.name: field for field in dataclasses.fields(cls) if field.name in names}


def section_lines(options: list[Option], fields: dict[str, dataclasses.Field]) -> list[str]:
    lines = ["| option | type | default | what it does |", "|---|---|---|---|"]
    for option in options:
        default = default_of(fields[option.name])
        cells = (
            f"`{option.name}`",
            f"`{option.type}`",
            "" if default == "None" else f"`{default}`",
            _links(option.text),
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def _links(text: str) -> str:
    """Names of classes as code: the docstrings' links are those of a documentation builder."""
    return re.sub(r"\[`~?(?:[\w.]+\.)?(\w+(?:\.\w+)?)`\]", r"`\1`", text)


def render() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for cls, title in CLASSES:
        lines += [f"## {title}", ""]
        options, fields = read_options(cls), own_fields(cls)
        for section in dict.fromkeys(option.section for option in options):
            if section:
                title = section.removeprefix("Parameters that control ")
                lines += [f"### {title[:1].upper()}{title[1:]}", ""]
            lines += [*section_lines([option for option in options if option.section == section], fields), ""]
        changed = [field for name, field in fields.items() if name not in {option.name for option in options}]
        if changed:
            lines += [
                "Other defaults than in `TrainingArguments`: "
                + ", ".join(f"`{field.name}` {default_of(field)}" for field in changed)
                + ".",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write docs/configuration.md from the dataclasses.")
    parser.add_argument("--check", action="store_true", help="Compare instead; exit code 1 where they differ.")
    args = parser.parse_args(argv)
    text = render()
    if not args.check:
        PATH.write_text(text, encoding="utf-8")
    elif not PATH.is_file() or PATH.read_text(encoding="utf-8") != text:
        print("docs/configuration.md is not what the dataclasses say: run python tools/configuration_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
