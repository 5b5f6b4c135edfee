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
List, show or copy the recipes: one per method and model family, with the published settings.

```bash
hf-unlearn recipes list rmu
hf-unlearn recipes show rmu_zephyr-7b_wmdp
hf-unlearn recipes copy rmu_zephyr-7b_wmdp my.yaml    # to change it; then --config my.yaml
```

`hf-unlearn train --config NAME` takes a name as well as a file.
"""

import difflib
import json
import os
import re
import sys
import textwrap
from dataclasses import asdict, dataclass
from importlib.resources import files

import yaml

from . import UsageError, run
from .diff import Parser


@dataclass(frozen=True)
class Recipe:
    """
    A recipe that hf-unlearn ships.

    Parameters:
        name (`str`): by which `--config` finds it.
        command (`str`): `train` or `intervene`.
        method (`str`): the losses, or the kind of intervention.
        model (`str`, *optional*): that it is for; `None` where you give one.
        source (`str`, *optional*): the paper.
        about (`str`): its first sentence.
        text (`str`): the file.
    """

    name: str
    command: str
    method: str
    model: str | None
    source: str | None
    about: str
    text: str


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn recipes", description="List, show or copy the recipes that come along.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    one = commands.add_parser("list", help="names, methods and models", prog="hf-unlearn recipes list")
    one.add_argument(
        "words", metavar="WORD", nargs="*", help="Only recipes with each of these in name, method or model."
    )
    one.add_argument("--json", action="store_true", help="Print them as JSON.")
    one = commands.add_parser("show", help="print one", prog="hf-unlearn recipes show")
    one.add_argument("name", metavar="NAME")
    one = commands.add_parser("copy", help="write one to a file, to change it", prog="hf-unlearn recipes copy")
    one.add_argument("name", metavar="NAME")
    one.add_argument("file", metavar="FILE", nargs="?", help="NAME.yaml in this folder where unset.")
    one.add_argument("--force", action="store_true", help="Replace a file that is there.")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.command == "list":
        words = [word.lower() for word in args.words]
        found = [
            recipe
            for recipe in read_recipes()
            if all(word in f"{recipe.name} {recipe.method} {recipe.model}".lower() for word in words)
        ]
        if not found:
            raise UsageError("No recipe has these words: `hf-unlearn recipes list` lists all.")
        print(as_json(found) if args.json else as_table(found))
        return 0
    recipe = find_recipe(args.name)
    if args.command == "show":
        print(recipe.text, end="")
        return 0
    path = args.file or f"{recipe.name}.yaml"
    if os.path.isdir(path):
        path = os.path.join(path, f"{recipe.name}.yaml")
    try:
        with open(path, "w" if args.force else "x", encoding="utf-8") as file:
            file.write(recipe.text)
    except FileExistsError:
        raise UsageError(f"{path} is there already: name another file, or add --force.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({os.strerror(error.errno)}): name another file.") from error
    print(f"{path}\nRun it: hf-unlearn {recipe.command} --config {path} ...")
    return 0


def read_recipes() -> list[Recipe]:
    """All recipes that come along, by name."""
    folder = files("hf_unlearn.recipes")
    paths = sorted((path for path in folder.iterdir() if path.name.endswith(".yaml")), key=lambda path: path.name)
    return [_parse(path.name.removesuffix(".yaml"), path.read_text(encoding="utf-8")) for path in paths]


def find_recipe(name: str) -> Recipe:
    """
    The recipe of a name, with or without `.yaml`.

    Raises:
        `UsageError`: there is none.
    """
    recipes = {recipe.name: recipe for recipe in read_recipes()}
    name = name.removesuffix(".yaml")
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1, cutoff=0.5)
        hint = f"Did you mean `{near[0]}`?" if near else "`hf-unlearn recipes list` lists all."
        raise UsageError(f"There is no recipe of this name. {hint}")
    return recipes[name]


def _parse(name: str, text: str) -> Recipe:
    settings = yaml.safe_load(text)
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    command = re.search(r"hf-unlearn (train|intervene) --config", comment)
    source = re.search(r"https://huggingface\.co/papers/[\d.]*\d", comment)
    sentences = re.sub(r"\s*\(?https://huggingface\.co/papers/[\d.]*\d\)?", "", comment)
    about = re.split(r"(?<=[\w)])\.\s", sentences, maxsplit=1)[0]
    losses = [settings[key] for key in ("kind", "forget_loss", "retain_loss") if key in settings]
    return Recipe(
        name=name,
        command=command[1],
        method=" + ".join(",".join(loss) if isinstance(loss, list) else str(loss) for loss in losses),
        model=settings.get("model_name_or_path"),
        source=source[0] if source else None,
        about=about,
        text=text,
    )


def as_json(recipes: list[Recipe]) -> str:
    entries = [asdict(recipe) for recipe in recipes]
    for entry in entries:
        del entry["text"]
    return json.dumps(entries, indent=2)


def as_table(recipes: list[Recipe]) -> str:
    """Name, losses and model of each, and how to go on."""
    rows = [("recipe", "losses or kind", "model"), *((one.name, one.method, one.model or "yours") for one in recipes)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {method:<{widths[1]}}  {model}" for name, method, model in rows]
    if len(recipes) == 1:
        lines += ["", *textwrap.wrap(recipes[0].about + ".", 100)]
    return "\n".join([*lines, "", "`hf-unlearn recipes show NAME` prints one, `copy NAME` writes it to a file."])


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
