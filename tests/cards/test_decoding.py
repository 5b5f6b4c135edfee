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
"""Decoded readings: every wrapping undone, nested ones too, and no input that makes it slow or fail."""

import base64
import html
import json
import random
import time
import unicodedata
from urllib.parse import quote

import pytest
import yaml

from hf_unlearn.cards.decoding import DEPTH, decoded_views, fold, visible


NAME = "Zoë Hsiao-Ünal of Ærø"


def words(text):
    folded = fold(text)
    return folded.text(0, len(folded.characters))


def full_width(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


WRAPPINGS = {
    "json": json.dumps,
    "json in json": lambda text: json.dumps(json.dumps(text)),
    "all escaped": lambda text: "".join(f"\\u{ord(c):04x}" for c in text),
    "braced escapes": lambda text: "".join(f"\\u{{{ord(c):x}}}" for c in text),
    "python bytes": lambda text: str(text.encode()),
    "octal": lambda text: "".join(f"\\{byte:03o}" for byte in text.encode()),
    "yaml": lambda text: yaml.safe_dump([text], width=8),
    "yaml binary": lambda text: yaml.safe_dump(text.encode()),
    "entities": lambda text: "".join(f"&#{ord(c)};" for c in text),
    "hexadecimal entities": lambda text: "".join(f"&#x{ord(c):X};" for c in text),
    "named entities": lambda text: text.translate({0xEB: "&euml;", 0xDC: "&Uuml;", 0xC6: "&AElig;", 0xF8: "&oslash;"}),
    "tags": lambda text: f"<td>{text.replace(' ', '</td><td>')}</td>",
    "percent": quote,
    "percent of all": lambda text: "".join(f"%{byte:02X}" for byte in text.encode()),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 without padding": lambda text: base64.b64encode(text.encode()).decode().rstrip("="),
    "urlsafe base64": lambda text: base64.urlsafe_b64encode(("~~~???" + text).encode()).decode(),
    "base64 in an address": lambda text: "https://x.org/a/b/" + base64.urlsafe_b64encode(text.encode()).decode(),
    "wrapped base64": lambda text: base64.encodebytes(("filler " * 20 + text).encode()).decode(),
    "base64 of UTF-16": lambda text: base64.b64encode("Zoe Hsiao-Unal".encode("utf-16-le")).decode(),
    "base64 twice": lambda text: base64.b64encode(base64.b64encode(text.encode())).decode(),
    "hex": lambda text: text.encode().hex(),
    "spaced hex": lambda text: text.encode().hex(" "),
    "hex with prefixes": lambda text: ", ".join(f"0x{byte:02x}" for byte in text.encode()),
    "percent of base64 of entities": lambda text: quote(base64.b64encode(html.escape(f"&#8203;{text}").encode())),
    "zero-width": lambda text: "\u200b".join(text),
    "soft hyphens": lambda text: "\u00ad".join(text),
    "bidi": lambda text: "\u202e" + "\u2066".join(text) + "\u202c",
    "full-width": full_width,
    "decomposed": lambda text: unicodedata.normalize("NFD", text),
    "upper case": str.upper,
    "without accents": lambda text: "Zoe Hsiao Unal of Ærø",
    "no-break spaces": lambda text: text.replace(" ", "\u00a0"),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapping_is_undone(wrapping):
    wrapped = WRAPPINGS[wrapping](NAME)
    expected = "zoehsiaounal" if wrapping == "base64 of UTF-16" else "zoehsiaounalofærø"
    readings = [words(view.text).replace(" ", "") for view in decoded_views(f"before: {wrapped} :after")]
    assert any(expected in reading for reading in readings)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_bytes_of_any_encoding(encoding):
    text = "by Zoë Hsiao-Ünal, Ærø"
    for content in (text.encode(encoding), b"\x89\x00\xff\x01" + text.encode(encoding) + b"\xfe\x00\x00\x80"):
        if encoding == "utf-32" and content.startswith(b"\x89"):
            continue
        assert any("zoehsiaounalærø" in words(view.text).replace(" ", "") for view in decoded_views(content))


def test_fold_by_hand():
    folded = fold("Straße_№ ٣4\n東京 is_camelCase7")
    assert folded.text(0, len(folded.characters)) == "strasse no 34 東 京 is camelcase7"
    assert folded.starts.tolist() == [0, 7, 9, 11, 12, 13, 15, 25]
    assert folded.seams.tolist() == [20, 24]
    assert folded.line_ends.tolist() == [11]
    assert len(fold("").characters) == 0 and fold(" .\u200b").starts.tolist() == [0]


def test_hangul_stays_whole_and_marks_do_not():
    assert words(unicodedata.normalize("NFD", "한국")) == words("한국") == "한국"
    assert words("e\u0301t\u0327e") == "ete"


def test_plain_text_has_one_reading():
    assert [view.text for view in decoded_views("A model of 3 layers, 100 steps.")] == [
        "A model of 3 layers, 100 steps."
    ]


def test_depth_is_bounded():
    text = NAME
    for _ in range(DEPTH + 1):
        text = base64.b64encode(text.encode()).decode()
    assert len(list(decoded_views(text))) <= DEPTH + 1


SLOW = {
    "base64": "QUFB" * 250_000,
    "base64 without end": "A" * 1_000_000,
    "hex": "41" * 500_000,
    "backslashes": "\\" * 1_000_000,
    "tags": "<" * 1_000_000,
    "open tags": "<a " * 300_000,
    "entities": "&" * 1_000_000,
    "entity": "&#" + "9" * 1_000_000 + ";",
    "entity in hex": "&#x" + "f" * 1_000_000,
    "percent": "%" * 1_000_000,
    "percent of percent": "%25" * 300_000,
    "marks": "e" + "\u0301\u0327" * 300_000,
    "lines": "QUFBQUFB\n" * 100_000,
    "hex apart": "41 " * 300_000,
    "expanding": "\ufdfa" * 50_000,
    "surrogates": "\\ud83d" * 100_000,
}


@pytest.mark.parametrize("name", SLOW)
def test_no_megabyte_takes_long(name):
    start = time.perf_counter()
    size = sum(len(visible(view.text)) for view in decoded_views(SLOW[name]))
    assert time.perf_counter() - start < 10
    assert size < 30 * len(SLOW[name])


def test_any_bytes_are_read():
    generator = random.Random(0)
    alphabet = [*b'\\ux0041%&#;<>=+/-_{}"', 0, 0xFF, 0xFE, 0xD8, 0xC3, 0xA9, *b"\r\n QUF"]
    for case in range(1000):
        length = generator.randrange(200)
        content = bytes(generator.choice(alphabet) for _ in range(length)) if case % 2 else generator.randbytes(length)
        for view in decoded_views(content):
            folded = fold(view.text)
            assert folded.starts[-1] == len(folded.characters)
            assert folded.text(0, len(folded.characters)).count(" ") == max(len(folded.starts) - 2, 0)
