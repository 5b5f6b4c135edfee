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
"""`hf-unlearn doctor`: what is broken makes it fail, what is missing without need is a note."""

import json
import sys
from importlib.metadata import requires, version

import pytest
from packaging.requirements import Requirement

from hf_unlearn.cli import doctor, main


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No token, wherever one may lie, and nobody to ask."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


def checks(capsys, *argv: str) -> tuple[int, dict[str, dict]]:
    code = main(["doctor", "--json", *argv])
    found = json.loads(capsys.readouterr().out)["checks"]
    return code, {f"{check['group']}/{check['name']}": check for check in found}


def test_this_environment_is_in_order(capsys):
    code, found = checks(capsys)
    assert code == 0 and not [check for check in found.values() if check["status"] == "broken"]
    # Every package of the metadata, with the version that is there
    needed = [Requirement(text) for text in requires("hf-unlearn")]
    needed = [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert len(needed) > 10
    for name in needed:
        assert found[f"Packages/{name}"] == {
            "group": "Packages",
            "name": name,
            "status": "ok",
            "message": version(name),
        }
    assert found["Hub/login"]["status"] == "note" and "hf auth login" in found["Hub/login"]["message"]
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert (
        "\nReady." in out and "  - login " in out and out == "".join(f"{line.rstrip()}\n" for line in out.splitlines())
    )


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package where Python finds it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, number: str, code: str = "") -> None:
        (tmp_path / f"{name}.py").write_text(code)
        folder = tmp_path / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")

    yield install
    for name in ("pkgold", "pkgbroken", "pkgfine"):
        sys.modules.pop(name, None)


def test_packages_that_are_broken(install, monkeypatch, capsys):
    install("pkgold", "1.2")
    install("pkgbroken", "3.0", "raise OSError('a library of /home/someone/lib is missing')")
    install("pkgfine", "3.0rc1")
    names = ["pkgold>=2", "pkgbroken>=2", "pkgfine>=2", "pkgnone>=2", "pkgextra>=2; extra == 'x'"]
    monkeypatch.setattr(doctor, "requires", lambda name: names)
    code, found = checks(capsys)
    assert code == 1
    status = {name.partition("/")[2]: check["status"] for name, check in found.items() if "/pkg" in name}
    assert status == {"pkgold": "broken", "pkgbroken": "broken", "pkgfine": "ok", "pkgnone": "broken"}
    assert found["Packages/pkgold"]["message"] == "1.2, and >=2 is needed: pip install 'pkgold>=2'"
    assert found["Packages/pkgbroken"]["message"].startswith("3.0 cannot be imported (OSError): pip install --force")
    assert found["Packages/pkgnone"]["message"] == "not there: pip install 'pkgnone>=2'"
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("Broken: pkgold, pkgbroken, pkgnone. See above what to do.\n")


def test_what_is_known_not_to_go_together(install, monkeypatch, capsys):
    install("pkgold", "1.2")
    monkeypatch.setattr(
        doctor, "_KNOWN", [("pkgold", "<2", "half of it"), ("pkgold", ">=2", "no"), ("none", "<2", "no")]
    )
    code, found = checks(capsys)
    assert code == 0
    assert found["Optional packages/pkgold"]["message"] == "1.2: half of it"


def test_little_disk_and_settings(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3 * 10**9}))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there" / "yet"))
    code, found = checks(capsys)
    assert code == 0
    assert found["Machine/disk"]["message"] == (
        "3 GB free where models are kept, too little for most models: set HF_HOME"
    )
    assert found["Machine/HF_HUB_OFFLINE"]["status"] == "note"
