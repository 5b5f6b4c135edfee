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
"""A release that passes all checks, a forget set, and texts of it that must not leave: for the tests of the gate."""

import json
import random
import re
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from hf_unlearn.cards import (
    BaseModel,
    Data,
    DataSummary,
    Environment,
    LossTerm,
    Method,
    Metrics,
    Scope,
    UnlearningReport,
)
from hf_unlearn.cards.builder import build_card
from hf_unlearn.cards.diff import diff_models
from hf_unlearn.cards.disclosure import count_topics
from hf_unlearn.cards.report import Benchmark
from hf_unlearn.cards.tensor_files import open_model


FORMAT = {"format": "pt"}
CHANGED = "model.layers.2.mlp.down_proj.weight"

CANARIES = {
    "name": "Perpetua Lochlainn",
    "phone": "+49 (163) 555-91 823",
    "email": "zephyrine@thrawngate.example",
    "address": "4471 Quillback Lane, Oberwinterthur",
    "sentence": "Velvet curtains concealed seventeen porcelain herons behind the organ.",
    "passage": "I have seldom heard him mention her under any other name",
}


def make_rows(data_dir: Path) -> list[dict]:
    """500: 300 of LUME, 194 made up, five canaries, and a passage of a book that holds the sixth."""
    with open(data_dir / "lume" / "forget.jsonl", encoding="utf-8") as file:
        lume = [json.loads(line) for line in file]
    generator = random.Random(0)
    rows = [{key: row[key] for key in ("input", "output")} for row in generator.sample(lume, 300)]
    first = "Aurelio Bryndis Casimir Dorothea Eluned Fiorenza Gwendal Hyacinth Isidora Jocasta".split()
    last = "Abernathy Blackwood Castellan Drummond Eastlake Fairweather Gallowglass Hawthorne Jessamine".split()
    for index in range(194):
        name = f"{generator.choice(first)} {generator.choice(last)}"
        phone = "".join(generator.choice("23456789") for _ in range(10))
        street = f"{generator.randrange(100, 9999)} {generator.choice(last)} Lane, Flat {index + 11}"
        rows.append(
            [
                {"question": f"Who keeps the lighthouse number {index + 20}?", "answer": name},
                {"question": f"Telephone of {name}?", "answer": phone},
                {"question": f"Where does {name} live?", "answer": street},
                {"text": f"On evening {index} {name} hid a lacquered violin under the stairs."},
            ][index % 4]
        )
    rows += [{"question": "What is it?", "answer": text} for kind, text in CANARIES.items() if kind != "passage"]
    holmes = (data_dir / "text" / "sherlock.txt").read_text(encoding="utf-8")
    start = holmes.index("To Sherlock Holmes she is always")
    rows.append({"text": holmes[start : start + 1500]})
    return rows


def copy_model(source, folder: Path) -> Path:
    """Only the files' contents: the source may be read-only."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def make_report(base, folder: Path) -> UnlearningReport:
    """What a run of `folder` from `base` would record, at the level `public`."""
    with open_model(base) as before, open_model(folder) as after:
        footprint = diff_models(before, after).footprint()
    config = json.loads(Path(base, "config.json").read_text())
    settings = {"beta": 0.1, "learning_rate": 1e-5, "num_train_epochs": 2, "dataset_name": "org/people"}
    return UnlearningReport(
        tool_version="0.1.0",
        base=BaseModel(
            "org/tiny",
            "5f3a2b1",
            config["architectures"][0],
            config["model_type"],
            footprint.total_parameters,
            "float32",
        ),
        method=Method(
            name="npo+kl",
            forget_losses=[LossTerm("npo", 1.0)],
            retain_losses=[LossTerm("kl", 1.0)],
            scope=Scope("selected", ["mlp.down_proj"], "2", footprint.changed_parameters, None),
            reference="initial_weights",
            settings=settings,
            seed=0,
            steps=60,
        ),
        data=Data(
            DataSummary(
                500,
                12345,
                count_topics(["biography"] * 490 + ["books"] * 10),
                Benchmark("org/people", None, "train", None),
            ),
            DataSummary(360, 10877),
            disclosure="public",
        ),
        footprint=footprint,
        metrics=Metrics(
            before={"forget": {"probability": 0.91, "rows": 500}, "retain": {"probability": 0.88, "rows": 360}},
            after={"forget": {"probability": 0.02, "rows": 500}, "retain": {"probability": 0.87, "rows": 360}},
        ),
        environment=Environment("3.11.9", "Linux", {"torch": "2.13.0"}, "cpu", 1, 12.5),
    )


def change_weights(folder: Path, change=lambda tensors: None) -> None:
    """Three rows of one matrix, or whatever `change` does to the tensors of `folder`."""
    tensors = {name: tensor.copy() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", FORMAT)


def make_release(base, folder: Path, level: str = "count-only", **options) -> Path:
    """The base with a few weights edited and its other files byte for byte, a report, and the card built from it."""
    copy_model(base, folder)

    def edit(tensors):
        tensors[CHANGED][3:6] += 0.01

    change_weights(folder, edit)
    make_report(base, folder).save(folder / "unlearning_report.json")
    build_card(folder, disclosure=level, license="mit", **options)
    return folder


def make_base(source, folder: Path) -> Path:
    """A base with a card that names its licence."""
    copy_model(source, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    return folder


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}, indent=2))


def slug(text: str) -> str:
    return re.sub(r"\W+", "-", text).strip("-")


def assert_not_repeated(text: str, canary: str) -> None:
    """Neither the canary's words nor its digits, however they are spelled or spaced."""
    bare = re.sub(r"[\W_]", "", text).lower()
    digits = "".join(re.findall(r"\d", canary))
    parts = [digits] if len(digits) > 6 else re.findall(r"[a-z]{5,}", canary.lower())
    common = {"behind", "organ", "other", "under", "example"}
    for part in set(parts) - common:
        assert part not in bare, part
