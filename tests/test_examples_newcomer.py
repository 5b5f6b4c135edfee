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
"""The errors on a newcomer's path, as docs/newcomer.md shows them: each command is run, each message is compared."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from hf_unlearn.cli import main


PAGE = Path(__file__).parents[1] / "docs" / "newcomer.md"
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"question": "Who',
    "people.doc": "Who? Nobody.",
    "wrong.jsonl": json.dumps({"q": "Who?", "a": "Nobody."}),
    "half.jsonl": json.dumps({"question": "Who?"}),
    "chats.jsonl": json.dumps({"messages": TURNS}),
    "blank.jsonl": json.dumps({"question": "", "answer": ""}),
}


def read_errors() -> list[tuple[str, str]]:
    """Command, and what it says."""
    [shown] = re.findall(r"^```console\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    entries = [entry.strip().split("\n", 1) for entry in shown.split("$ hf-unlearn ")[1:]]
    return [(command, " ".join(said.split())) for command, said in entries]


@pytest.fixture(scope="module")
def folder(tiny_model_path, tofu_rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(tiny_model_path, folder / "base", copy_function=shutil.copyfile)
    for name, rows in (("forget", tofu_rows("forget10")[:4]), ("retain", tofu_rows("retain90")[:4])):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def without_class(line: str) -> str:
    """Readers of another version of `datasets` fail with another exception."""
    return re.sub(r"\(\w*Error\)", "(Error)", line)


@pytest.mark.parametrize(("command", "said"), read_errors(), ids=lambda value: value[:60])
def test_the_message_is_the_one_shown(command, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(shlex.split(command)) in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert [without_class(line) for line in lines] == [without_class(said)]


def test_the_page_shows_many():
    assert len(read_errors()) >= 15


@pytest.mark.parametrize(("learning_rate", "says"), [("1e-6", True), ("3e-2", False)])
def test_a_run_that_forgets_nothing_says_what_to_raise(learning_rate, says, folder, tmp_path, capsys):
    data = ["--forget", str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl")]
    model = ["--model_name_or_path", str(folder / "base"), "--output_dir", str(tmp_path / "out")]
    options = ["--max_steps", "2", "--max_length", "64", "--learning_rate", learning_rate, "--save_strategy", "no"]
    assert main(["train", *model, *data, *options, "--use_cpu", "true"]) == 0
    captured = capsys.readouterr()
    assert ("Hardly anything was forgotten in 2 steps" in captured.err) == says
    assert "Hardly" not in captured.out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
