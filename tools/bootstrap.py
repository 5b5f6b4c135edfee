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
"""Create the virtual environment of this checkout and install the package in it; the Makefile calls this first.

It needs the standard library only. The file has to parse, and its imports to work, on old interpreters, so that they
reach the check that says what is wrong.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Written empty before anything else, filled when the install is complete: an empty one tells of an interrupted
# install, and a folder without one is not ours to touch.
STAMP = "hf-unlearn-install.json"

# What pip downloads, in round figures.
SIZES = {
    "cpu": "about 0.4 GB",
    "cuda": "about 3 GB",
    "macos": "about 0.3 GB",
    "system": "about 0.2 GB",
    "unknown": "0.4 GB with a CPU build of torch, 3 GB with a CUDA build",
}


def fail(sentence):
    sys.exit(f"error: {sentence}")


def check_interpreter():
    if sys.version_info < (3, 11):  # noqa: UP036 (this very line is for the older ones)
        fail(
            f"hf-unlearn needs Python 3.11 or newer, and {sys.executable} is {platform.python_version()}: install one "
            "and name it, for example `make test PYTHON=python3.11`."
        )
    try:
        import ensurepip  # noqa: F401 (Debian and Ubuntu ship venv without it)
        import venv  # noqa: F401
    except ImportError:
        name = "python{}.{}-venv".format(*sys.version_info)
        fail(
            f"{sys.executable} cannot create virtual environments: install its venv module (Debian and Ubuntu: "
            f"`apt install {name}`) or name another interpreter with PYTHON=."
        )


def answers(url, seconds=3):
    """Whether `url` answers in time. In a thread, because a name look-up that hangs has no time-out of its own."""
    ok = []

    def ask():
        with contextlib.suppress(Exception):  # whatever goes wrong, the answer is no
            urllib.request.urlopen(url, timeout=seconds).close()
            ok.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(ok)


def has_nvidia_gpu():
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return bool(shutil.which("nvidia-smi")) and subprocess.run(["nvidia-smi"], **quiet).returncode == 0


def find_system_torch():
    """Return the version of this interpreter's torch, and the folder that it is installed in."""
    from importlib import metadata  # not on Python 3.7

    try:
        torch = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        fail(f"SYSTEM_TORCH=1, but {sys.executable} has no torch: name an interpreter that has one with PYTHON=.")
    return torch.version, str(torch.locate_file(""))


def choose_torch(args):
    """Decide where torch comes from: (the kind of download, an index or `None` for pip's own, the sentence to say).

    Sets `args.constraints` where the choice is to install the tested versions.
    """
    if args.system_torch:
        return "system", None, f"torch {args.torch} of {sys.executable} is used as it is."
    if args.torch_index:
        return "unknown", args.torch_index, f"torch comes from {args.torch_index}."
    if platform.system() == "Darwin":
        return "macos", None, "torch is the macOS build."
    if has_nvidia_gpu():
        return "cuda", None, "torch is the CUDA build, because there is an NVIDIA GPU."
    if answers(CPU_INDEX + "/torch/"):
        return "cpu", CPU_INDEX, "torch is the CPU build, because there is no NVIDIA GPU (TORCH_INDEX= for another)."
    sentence = f"torch comes from pip's own index, because {CPU_INDEX} does not answer"
    if not args.constraints and not args.torch:
        args.constraints = str(ROOT / "constraints-ci.txt")
        sentence += "; all versions are those that CI tests, from constraints-ci.txt"
    return "unknown", None, sentence + "."


def options(args):
    """What the environment is made of. Where this changes it is made anew; where only files change, pip updates it."""
    return {
        "root": str(ROOT),
        "python": [sys.base_prefix, platform.python_version()],
        "install": args.install or "this checkout",
        "torch": [args.torch, args.torch_index, args.system_torch],
    }


def files(args):
    """A digest of all that says what pip installs; every constraints file, because they include each other."""
    digest = hashlib.sha256(args.constraints.encode())
    for path in [ROOT / "pyproject.toml", *sorted(ROOT.glob("constraints*.txt")), args.constraints]:
        digest.update(Path(path).read_bytes() if path else b"")
    return digest.hexdigest()


def run(*command):
    status = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if status:
        what = " ".join(map(str, command[1:4]))
        fail(f"`{what}` failed with status {status}: see its message above, then run the same command again.")


def make_environment(venv, system_torch):
    for path in list(venv.iterdir()):
        if path.name != STAMP:  # it stays until the end, so that this too can be interrupted
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    in_venv = sys.prefix != sys.base_prefix
    run(sys.executable, "-m", "venv", *(["--system-site-packages"] if system_torch and not in_venv else []), venv)
    if system_torch and in_venv:
        # --system-site-packages would show what is under the virtual environment of PYTHON, not what is in it.
        site_packages = venv / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
        (site_packages / "_system_torch.pth").write_text(system_torch + "\n")


def install(venv, args):
    python = venv / "bin" / "python"
    kind, index, sentence = choose_torch(args)
    print(f"Installing into {venv}: pip downloads {SIZES[kind]}, less what is in its cache; {sentence}", flush=True)

    constraints = ["-c", Path(args.constraints).resolve()] if args.constraints else []
    if args.torch:
        pin = venv / "torch-constraint.txt"
        pin.write_text(f"torch=={args.torch}\n")
        constraints += ["-c", pin]
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    pip += [] if sys.stdout.isatty() else ["--quiet"]
    if index:
        run(*pip, *constraints, "--index-url", index, "torch")
    run(*pip, *constraints, *([args.install] if args.install else ["-e", ".[test,plots]"]))


def main():
    check_interpreter()
    parser = argparse.ArgumentParser(description="Create a virtual environment and install hf-unlearn in it.")
    parser.add_argument("--venv", default=".venv")
    parser.add_argument("--constraints", default="", help="a pip constraints file")
    parser.add_argument("--torch", default="", help="the version of torch")
    parser.add_argument("--torch-index", default="", help="the package index that torch comes from")
    parser.add_argument("--system-torch", default="", help="1: use the torch of this interpreter")
    parser.add_argument("--install", default="", help="a wheel to install instead of this checkout")
    args = parser.parse_args()
    venv = Path(args.venv).resolve()
    if Path(sys.prefix).resolve() == venv:
        # The environment is active and PYTHON is its own: it cannot make itself anew, the one under it can.
        os.execv(sys._base_executable, [sys._base_executable, *sys.argv])
    args.system_torch = args.system_torch not in ("", "0")
    if args.system_torch:
        args.torch, args.system_torch = find_system_torch()

    if args.constraints and not Path(args.constraints).is_file():
        fail(f"CONSTRAINTS={args.constraints} is not a file: name one that exists, for example constraints.txt.")
    stamp = venv / STAMP
    state = {"options": options(args), "files": files(args)}
    if venv.is_dir() and any(venv.iterdir()) and not stamp.is_file():
        fail(f"{venv} was not made by this Makefile: move it away, or name another folder with VENV=.")
    before = json.loads(stamp.read_text() or "{}") if stamp.is_file() else {}
    if before == state:
        return

    venv.mkdir(parents=True, exist_ok=True)
    stamp.write_text("")
    if before.get("options") != state["options"]:
        make_environment(venv, args.system_torch)
    install(venv, args)
    stamp.write_text(json.dumps(state, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command starts the installation again.")
