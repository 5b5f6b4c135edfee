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
The walkthroughs in examples/: every block is run in the order of the page, and what it prints is compared.

A `bash` or `python` block is run, and a `text` block after it is what it prints; commands in an `sh` block are for a
larger model, and are only parsed. Quick runs use a smaller quickstart, and compare what is not a number; the slow ones
run the pages as they are. `HF_UNLEARN_WRITE_WALKTHROUGHS=1` makes the slow ones write what is printed into the pages.
"""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from hf_unlearn.cli import COMMANDS, main, quickstart
from hf_unlearn.cli.quickstart_models import Settings


ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "hub"))
from loopback_hub import LoopbackHub  # noqa: E402


PAGES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.md")) if path.stem != "README"}
SMALL = {
    "num_people": 12,
    "num_forget": 2,
    "vocab_size": 800,
    "hidden_size": 64,
    "num_layers": 4,
    "teaching_steps": 150,
    "teaching_batch_size": 24,
    "teaching_learning_rate": 6e-3,
    "forgetting_epochs": 20,
}
QUICKSTART = ["quickstart", "--output_dir", "out/quickstart"]
# Which talk to the Hub, or look at files: the client freezes its endpoint when it is imported, so that each gets a
# process of its own, which takes a fraction of a second
WITHOUT_TORCH = ("apply", "audit", "check", "diff", "push", "release", "verify")
# Stands for `hf-unlearn` in the shell: the process that imported torch runs the command
STUB = """\
#!{python} -SE
import json, os, socket, sys
if sys.argv[1] in {without_torch}:
    os.execv({python!r}, [{python!r}, "-m", "hf_unlearn.cli", *sys.argv[1:]])
with socket.create_connection(("127.0.0.1", {port})) as connection, connection.makefile("rw") as stream:
    stream.write(json.dumps([os.getcwd(), sys.argv[1:]]) + "\\n")
    stream.flush()
    code, out, err = json.loads(stream.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
IDENTIFIER = re.compile(r"\b(?=[a-f]*\d)[0-9a-f]{7,}\b|\d+(?:\.\d+)? (?:[kKMG]i?B|s\b|seconds)")


# ---- Reading pages ----


class Block(NamedTuple):
    """A piece of a page: its language, its lines, and where it stands."""

    language: str
    code: str
    start: int
    end: int


def read_blocks(text: str) -> list[Block]:
    return [
        Block(match[1], match[2], match.start(), match.end())
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def read_steps(text: str) -> list[tuple[Block, Block | None]]:
    """The blocks to run, each with what it prints where the page shows it."""
    blocks = read_blocks(text)
    pairs = zip(blocks, [*blocks[1:], None], strict=True)
    return [
        (block, after if after is not None and after.language == "text" else None)
        for block, after in pairs
        if block.language in ("bash", "python")
    ]


# ---- Running them ----


class Runner:
    """
    Runs the blocks of one page in one folder: a real shell, whose variables live on from block to block, with the
    commands of this package in this process.

    Args:
        folder (`Path`): where the page is followed.
        environment (`dict[str, str]`): of the shell.
        ready (`Path`, *optional*): what the quickstart left in an earlier run: it is copied, not made again.
    """

    def __init__(self, folder: Path, environment: dict[str, str], ready: Path | None):
        self.folder, self.ready = folder, ready
        self.state = folder.with_name(f"{folder.name}.variables")
        self.state.touch()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(0.05)
        programs = folder.with_name(f"{folder.name}.programs")
        programs.mkdir()
        stub = programs / "hf-unlearn"
        port = self.server.getsockname()[1]
        stub.write_text(STUB.format(python=sys.executable, without_torch=WITHOUT_TORCH, port=port))
        stub.chmod(0o755)
        path = os.pathsep.join([str(programs), os.path.dirname(sys.executable), os.environ["PATH"]])
        self.environment = {**os.environ, **environment, "PATH": path}

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self.server.close()

    def run(self, block: Block) -> str:
        """What a block prints to stdout; a block that fails fails the test."""
        return self._bash(block.code) if block.language == "bash" else self._python(block.code)

    def _python(self, code: str) -> str:
        with chdir(self.folder), redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "block.py", "exec"), {"__name__": "__main__"})
        return out.getvalue()

    def _bash(self, code: str) -> str:
        script = f"set -euo pipefail -a\nsource {shlex.quote(str(self.state))}\n{code}\n"
        script += f"export -p | grep -v ' PATH=' > {shlex.quote(str(self.state))}\n"
        output = self.folder.with_name(f"{self.folder.name}.output")
        with open(output, "w+b") as file, subprocess.Popen(
            ["bash", "-c", script], stdout=file, stderr=subprocess.PIPE, cwd=self.folder, env=self.environment
        ) as process:  # fmt: skip
            while process.poll() is None:
                try:
                    connection, _ = self.server.accept()
                except TimeoutError:
                    continue
                connection.settimeout(None)
                with connection, connection.makefile("rw") as stream:
                    json.dump(self._command(*json.loads(stream.readline())), stream)
            assert process.returncode == 0, f"{code}\n{process.stderr.read().decode()[-3000:]}"
        return output.read_text(encoding="utf-8")

    def _command(self, cwd: str, argv: list[str]) -> tuple[int, str, str]:
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, chdir(cwd):
            if argv == QUICKSTART and self.ready is not None:
                shutil.copytree(self.ready / "out" / "quickstart", "out/quickstart")
                return 0, (self.ready / "printed.txt").read_text(encoding="utf-8"), ""
            try:
                code = main(argv)
            except (Exception, SystemExit):  # the shell must hear of it, or it waits
                traceback.print_exc()
                code = 70
        return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def hub_environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """A Hub on this machine, and the token of its user `you`."""
    with LoopbackHub() as hub:
        hub.lfs_threshold = 100_000
        yield {**hub.environment(tmp_path_factory.mktemp("hub"), hub.add_user("you")), "OMP_NUM_THREADS": "1"}


def make_quickstart(folder: Path) -> Path:
    with chdir(folder), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
        assert main(QUICKSTART) == 0
    (folder / "printed.txt").write_text(out.getvalue(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small_quickstart(tmp_path_factory) -> Iterator[Path]:
    """A folder in which a small quickstart ran."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(quickstart, "Settings", partial(Settings, **SMALL))
        yield make_quickstart(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module")
def whole_quickstart(tmp_path_factory) -> Path:
    return make_quickstart(tmp_path_factory.mktemp("quickstart"))


def follow(page: Path, folder: Path, environment: dict[str, str], ready: Path) -> list[tuple[Block, str]]:
    """Runs a page; what is shown on it, each with what was printed."""
    folder.mkdir()
    printed = []
    with Runner(folder, environment, ready) as runner:
        for block, shown in read_steps(page.read_text(encoding="utf-8")):
            out = runner.run(block).replace(environment["HF_ENDPOINT"], "https://huggingface.co")
            if shown is not None:
                printed.append((shown, out))
    return printed


# ---- Comparing ----


def words(text: str) -> list[str]:
    """Lines without numbers, identifiers and widths."""
    return [" ".join(NUMBER.sub("#", IDENTIFIER.sub("#", line)).split()) for line in text.strip().splitlines()]


def numbers(text: str) -> list[list[float]]:
    """The numbers of each line, but for those that tell how long something took."""
    lines, timed = [], False
    for line in text.strip().splitlines():
        found = [float(number.replace(",", "")) for number in NUMBER.findall(IDENTIFIER.sub("", line))]
        lines.append(found[1:] if timed else found)
        timed = line.split()[:1] == ["seconds"]  # a table whose first column they are
    return lines


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_on_a_small_model(name, tmp_path, hub_environment, small_quickstart):
    steps = follow(PAGES[name], tmp_path / "here", hub_environment, small_quickstart)
    assert len(steps) >= 3, "a page shows what its commands print"
    for shown, printed in steps:
        assert words(printed) == words(shown.code)
        for before, after, _ in re.findall(r"^  forget set +([\d.]+) +([\d.]+) +(\d+)$", printed, re.MULTILINE):
            assert float(after) < 0.7 * float(before)
        for before, after, _ in re.findall(r"^  retain set +([\d.]+) +([\d.]+) +(\d+)$", printed, re.MULTILINE):
            assert float(after) > 0.8 * float(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_what_it_shows(name, tmp_path, hub_environment, whole_quickstart):
    steps = follow(PAGES[name], tmp_path / "here", hub_environment, whole_quickstart)
    if os.environ.get("HF_UNLEARN_WRITE_WALKTHROUGHS"):
        text = PAGES[name].read_text(encoding="utf-8")
        for shown, printed in reversed(steps):
            text = f"{text[: shown.start]}```text\n{printed.strip(chr(10))}\n```{text[shown.end :]}"
        PAGES[name].write_text(text, encoding="utf-8")
        return
    for shown, printed in steps:
        assert words(printed) == words(shown.code)
        for expected, found in zip(numbers(shown.code), numbers(printed), strict=True):
            assert found == pytest.approx(expected, rel=0.1, abs=0.03)


# ---- What is not run ----


def commands(code: str) -> list[list[str]]:
    """The `hf-unlearn` commands of a block, without comments, and with what an earlier one left as a plain word."""
    lines = re.sub(r"\\\n", " ", code).splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in split if line[:1] == ["hf-unlearn"]]


@pytest.mark.parametrize("name", PAGES)
def test_commands_for_larger_models_parse(name):
    blocks = [block for block in read_blocks(PAGES[name].read_text(encoding="utf-8")) if block.language == "sh"]
    found = [command for block in blocks for command in commands(block.code)]
    assert found, "every page says what to do with one's own model"
    for command, *argv in found:
        assert command in COMMANDS
        module = importlib.import_module(f"hf_unlearn.cli.{command.replace('-', '_')}")
        parser = module.make_parser()
        parser.parse(argv) if hasattr(parser, "parse") else parser.parse_args(argv)


def test_the_pages_are_listed():
    index = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\]\(([\w.]+)\)", index))
    files = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".md", ".py")}
    assert files - {"README.md", "__init__.py"} <= listed
