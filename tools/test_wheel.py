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
"""Build the sdist and from it the wheel, and check what a user gets who installs that wheel; see `make test-wheel`."""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent

# Folder in the checkout -> package in the wheel (`[tool.setuptools.package-dir]`), inner folders first.
FOLDERS = {
    "examples/recipes": "hf_unlearn/recipes",
    "trainer_callbacks": "hf_unlearn/trainer_callbacks",
    "cards": "hf_unlearn/cards",
    "hf_unlearn": "hf_unlearn",
}

# Runs in the new environment, from an empty folder. Every module is imported: one that needs more than the declared
# dependencies fails here, where no extra is installed.
IMPORT_ALL = """
import importlib, pkgutil, sysconfig
import hf_unlearn, hf_unlearn.cards, hf_unlearn.recipes, hf_unlearn.trainer_callbacks

names = ["hf_unlearn", *(m.name for m in pkgutil.walk_packages(hf_unlearn.__path__, "hf_unlearn."))]
for name in names:
    if not name.endswith(".__main__"):
        path = importlib.import_module(name).__file__
        assert path.startswith(sysconfig.get_path("purelib")), f"{name} comes from {path}"
print(f"imported {len(names)} modules")
"""


def expected_files():
    """The files of the checkout that a wheel must hold, as their names in the wheel."""
    expected = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".md", ".pyc"):
                expected.add(f"{package}/{path.relative_to(ROOT / folder).as_posix()}")
    return expected


def run(*command, cwd=None):
    command = [str(part) for part in command]
    line = " ".join(part if "\n" not in part else "'...'" for part in command)
    print("+", line, flush=True)
    if subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL).returncode:
        sys.exit(f"error: `{line}` failed.")


def main():
    parser = argparse.ArgumentParser(description="Build the wheel and test it; other options go to bootstrap.py.")
    parser.add_argument("--build-with", required=True, help="a Python that has the `build` package")
    parser.add_argument("--constraints", default="")
    args, options = parser.parse_known_args()
    constraints = args.constraints or ROOT / "constraints-ci.txt"

    with tempfile.TemporaryDirectory(prefix="hf-unlearn-wheel-") as folder:
        folder = Path(folder).resolve()
        run(args.build_with, "-m", "build", "--outdir", folder, ROOT)
        (wheel,) = folder.glob("*.whl")

        names = set(zipfile.ZipFile(wheel).namelist())
        top = {name.split("/")[0] for name in names}
        dist_info = {name for name in top if name.startswith("hf_unlearn-") and name.endswith(".dist-info")}
        if top != {"hf_unlearn"} | dist_info:
            sys.exit(f"error: the wheel has more at its top level than hf_unlearn: {sorted(top)}.")
        missing = sorted(expected_files() - names)
        if missing:
            sys.exit(f"error: pyproject.toml leaves these out of the wheel (packages, package-data): {missing}.")

        venv = folder / "venv"
        bootstrap = ROOT / "tools" / "bootstrap.py"
        run(sys.executable, bootstrap, "--venv", venv, "--install", wheel, "--constraints", constraints, *options)
        empty = folder / "empty"
        empty.mkdir()
        run(venv / "bin" / "python", "-m", "pip", "check", cwd=empty)
        run(venv / "bin" / "python", "-I", "-c", IMPORT_ALL, cwd=empty)
        run(venv / "bin" / "hf-unlearn", "--help", cwd=empty)
        print(f"ok: {wheel.name} holds {len(names)} files and works.")


if __name__ == "__main__":
    main()
