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
import os

import pytest

from hf_unlearn.cards.licence import check_licence, inherit_licence
from hf_unlearn.cards.release import read_release


@pytest.fixture
def folder(tmp_path):
    def make(name, card=None, **files):
        (tmp_path / name).mkdir()
        if card is not None:
            (tmp_path / name / "README.md").write_text(f"---\n{card}\n---\n# Title\n")
        for file, content in files.items():
            (tmp_path / name / file.replace("__", ".")).write_bytes(content)
        return tmp_path / name

    return make


def rules(findings):
    return [(finding.rule, finding.file) for finding in findings]


def test_keys_and_files_are_inherited_as_they_are(folder):
    terms = b"Terms\r\n\xff\xfe no UTF-8"
    base = folder(
        "base",
        "license: other\nlicense_name: tiny\nlicense_link: LICENSE__md",
        LICENSE__md=terms,
        NOTICE=b"n",
        Use_Policy__md=b"p",
    )
    (base / "README.md").write_text((base / "README.md").read_text().replace("__", "."))
    inherited = inherit_licence(base)
    assert inherited.metadata == {"license": "other", "license_name": "tiny", "license_link": "LICENSE.md"}
    assert inherited.files == {"LICENSE.md": terms, "NOTICE": b"n", "Use_Policy.md": b"p"}
    assert inherited.findings == []


def test_metadata_of_the_hub_comes_before_the_folder(folder):
    base = folder("base", "license: mit")
    assert inherit_licence(base, {"license": "llama2", "tags": ["x"]}).metadata == {"license": "llama2"}


@pytest.mark.parametrize(
    "card, files, resolved",
    [
        (None, {}, False),
        ("tags: [a]", {}, False),
        ("license: unknown", {}, False),
        ("license: other", {}, False),
        ("license: other\nlicense_link: LICENSE", {}, False),  # it leads nowhere
        ("license: other\nlicense_name: x", {"LICENSE": b"x"}, True),
        ("license: other\nlicense_link: https://x.y/z", {}, True),
        ("license: mit", {}, True),
        (None, {"LICENSE": b"MIT License"}, True),
        (None, {"NOTICE": b"x"}, False),
    ],
)
def test_nothing_is_chosen_for_the_publisher(folder, card, files, resolved):
    base = folder("base", card, **files)
    inherited = inherit_licence(base)
    assert rules(inherited.findings) == ([] if resolved else [("licence-unresolved", "README.md")])
    assert inherit_licence(base, acknowledged=True).findings == []
    # Never a key that the base has not: not even from the text of a licence
    assert set(inherited.metadata) <= {line.split(":")[0] for line in (card or "").splitlines()}
    assert "unknown" not in inherited.metadata.values()


def test_the_real_base(data_dir):
    inherited = inherit_licence(data_dir / "tinystories-1m")
    assert inherited.metadata == {} and inherited.findings == []
    assert inherited.files == {"LICENSE": (data_dir / "tinystories-1m" / "LICENSE").read_bytes()}


def test_a_snapshot_of_the_cache(tmp_path):
    blob, snapshot = tmp_path / "blobs" / ("a" * 64), tmp_path / "snapshots" / "main"
    blob.parent.mkdir()
    snapshot.mkdir(parents=True)
    blob.write_bytes(b"text")
    os.symlink(f"../../blobs/{'a' * 64}", snapshot / "LICENSE")
    os.symlink("/etc/hostname", snapshot / "NOTICE")
    assert inherit_licence(snapshot).files == {"LICENSE": b"text"}


def test_a_release_that_says_something_else(folder):
    base = folder("base", "license: llama2", LICENSE=b"text", NOTICE=b"n")
    cases = {
        "same": ("license: llama2", {"LICENSE": b"text", "NOTICE": b"n"}, []),
        "other-key": ("license: mit", {"LICENSE": b"text", "NOTICE": b"n"}, ["README.md"]),
        "no-key": ("tags: [a]", {"LICENSE": b"text", "NOTICE": b"n"}, ["README.md"]),
        "changed": ("license: llama2", {"LICENSE": b"Text", "NOTICE": b"n"}, ["LICENSE"]),
        "missing": ("license: llama2", {"LICENSE": b"text"}, ["NOTICE"]),
        "more": ("license: llama2", {"LICENSE": b"text", "NOTICE": b"n", "LICENSE-MIT": b"x"}, ["LICENSE-MIT"]),
    }
    with read_release(base) as read_base:
        for name, (card, files, wrong) in cases.items():
            with read_release(folder(name, card, **files)) as release:
                assert rules(check_licence(release, read_base)) == [("licence-differs", file) for file in wrong]


def test_a_licence_of_ones_own_where_the_base_has_none(folder):
    with read_release(folder("base")) as base, read_release(folder("new", "license: mit")) as release:
        assert rules(check_licence(release, base)) == [
            ("licence-unresolved", "README.md"),
            ("licence-differs", "README.md"),
        ]
        assert check_licence(release, base, acknowledged=True) == []
