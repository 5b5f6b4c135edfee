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
"""The leak scanner: every text of a forget set in every wrapping, nothing in ordinary cards, and no match repeated."""

import base64
import functools
import html
import json
import random
import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml

from hf_unlearn.cards import render_model_card
from hf_unlearn.cards.findings import match_hash
from hf_unlearn.cards.leaks import MOST_FINDINGS, LeakScanner


REPOSITORY = Path(__file__).parents[2]
FIRST = "Aurelio Bryndis Casimir Dorothea Eluned Fiorenza Gwendal Hyacinth Isidora Jocasta".split()
LAST = "Abernathy Blackwood Castellan Drummond Eastlake Fairweather Gallowglass Hawthorne Ironside Jessamine".split()
STREETS = "Thornapple Quillback Marigold Foxglove Larkspur".split()


@pytest.fixture(scope="module")
def rows(data_dir):
    """500: 300 of LUME, 199 made up, and a passage of a book."""
    with open(data_dir / "lume" / "forget.jsonl", encoding="utf-8") as file:
        lume = [json.loads(line) for line in file]
    generator = random.Random(0)
    rows = generator.sample(lume, 300)
    for index in range(199):
        name = f"{generator.choice(FIRST)} {generator.choice(LAST)}"
        phone = "".join(generator.choice("23456789") for _ in range(10))
        street = f"{generator.randrange(100, 9999)} {generator.choice(STREETS)} Lane, Flat {index + 11}"
        sentence = f"On evening {index} {name} hid a lacquered violin under the {generator.choice(STREETS)} stairs."
        rows.append(
            [
                {"question": f"Who keeps the lighthouse number {index + 20}?", "answer": name},
                {"prompt": f"Telephone of {name}?", "completion": phone},
                {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": street}]},
                {"text": sentence},
            ][index % 4]
        )
    holmes = (data_dir / "text" / "sherlock.txt").read_text(encoding="utf-8")
    start = holmes.index("To Sherlock Holmes she is always")
    rows.append({"text": holmes[start : start + 1500]})
    return rows


@pytest.fixture(scope="module")
def scanner(rows):
    return LeakScanner(rows)


NAME = "Perpetua Zoë Ó Lochlainn"
CANARIES = {
    "forget-answer": NAME,
    "forget-number": "+49 (163) 555-91 823",
    "forget-email": "perpetua_o@lochlainn.example",
    "forget-entity": "Thrawn Gate Observatory",
    "forget-words": "velvet curtains concealed seventeen porcelain herons",
    "forget-characters": "那年冬天她把十七只瓷鹭藏在天鹅绒窗帘后面直到雪落在旧天文台的屋顶上才取出来",
}
CANARY_ROWS = [
    {"question": "Who is it?", "answer": NAME},
    {"text": f"She is reached at {CANARIES['forget-number']} or {CANARIES['forget-email']} most days."},
    {"text": f"He met her near the {CANARIES['forget-entity']}, where {CANARIES['forget-words']} from view."},
    {"text": f"传说{CANARIES['forget-characters']}，然后离开了。"},
]


@pytest.fixture(scope="module")
def canary_scanner(rows):
    return LeakScanner(rows[:50] + CANARY_ROWS)


def full_width(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def alternating(text):
    return "".join(c.upper() if index % 2 else c.lower() for index, c in enumerate(text))


def halves(text, between):
    middle = len(text) // 2
    return text[:middle] + between + text[middle:]


def urlsafe(text):
    return base64.urlsafe_b64encode(text.encode()).decode()


WRAPPINGS = {
    "plain": str,
    "json": json.dumps,
    "all escaped": lambda text: "".join(f"\\u{ord(c):04x}" for c in text),
    "yaml": lambda text: yaml.safe_dump({"model_name": text}, width=10),
    "entities": lambda text: "".join(f"&#{ord(c)};" for c in text),
    "escaped HTML": lambda text: html.escape(text).replace(" ", "&nbsp;"),
    "percent": quote,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 without padding": lambda text: base64.b64encode(text.encode()).decode().rstrip("="),
    "urlsafe base64": urlsafe,
    "urlsafe base64 without padding": lambda text: urlsafe(text).rstrip("="),
    "hex": lambda text: text.encode().hex(),
    "zero-width": lambda text: "\u200b".join(text),
    "full-width": full_width,
    "mixed case": alternating,
    "two lines": lambda text: halves(text, "\n"),
    "two table cells": lambda text: halves(text, " | "),
    "two cells of HTML": lambda text: f"<tr><td>{halves(text, '</td><td>')}</td></tr>",
    "spaced out": lambda text: " ".join(text),
    "comment": lambda text: f"<!-- {text} -->",
    "UTF-16": lambda text: f"a card about {text}, no less".encode("utf-16"),
    "UTF-16 without mark": lambda text: f"a card about {text}, no less".encode("utf-16-le"),
    "bytes": lambda text: b"\x89PNG\0\x01\xff" + text.encode() + b"\xff\xd8\0",
    "base64 of JSON of entities": lambda text: base64.b64encode(json.dumps(html.escape(text)).encode()).decode(),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("rule", CANARIES)
def test_canary_is_found(canary_scanner, rule, wrapping):
    wrapped = WRAPPINGS[wrapping](CANARIES[rule])
    content = wrapped if isinstance(wrapped, bytes) else f"# A card\n\nabout ({wrapped}), no less\n"
    findings = canary_scanner.scan("notes/card.md", content)
    expected = rule
    if rule == "forget-words" and wrapping == "spaced out":
        # A run with words in pieces is found by its characters
        expected = "forget-characters"
    assert expected in {finding.rule for finding in findings}
    for finding in findings:
        assert finding.file == "notes/card.md"
        assert finding.message.startswith("notes/card.md") and finding.rule in finding.message
        assert re.fullmatch("[0-9a-f]{64}", finding.match_sha256)
        shown = re.sub(r"[\W_]", "", repr(finding) + str(finding)).lower()
        for part in re.findall(r"[^\W_]{4,}", CANARIES[rule].lower()):
            assert part not in shown


def test_canary_scanner_finds_nothing_else(canary_scanner):
    assert canary_scanner.scan("README.md", "# A card\n\nabout (a small model), no less\n") == []


@pytest.mark.parametrize(
    "number",
    ["4916355591823", "49-16355591823", "(+49) 163.555.91.823", "49 1 6 3 5 5 5 9 1 8 2 3", "49_163_555_91_823"],
)
def test_number_in_any_grouping_is_one_match(canary_scanner, number):
    findings = canary_scanner.scan("x", f"call {number}!")
    assert [finding.rule for finding in findings] == ["forget-number"]
    assert findings[0].match_sha256 == match_hash("4916355591823")


def test_number_within_a_longer_one_is_none(canary_scanner):
    assert canary_scanner.scan("x", "loss 0.49163555918231 and 14916355591823") == []


def test_numbers_and_short_answers():
    rows = [{"answer": answer} for answer in ("Jo", "yes", "No.", "12345", "7", "C", "2013", "XY 9", "the", "东京")]
    scanner = LeakScanner(
        [*rows, {"text": "about 250,000 people from 1999-2003 at 2001-09-11, room 123456", "id": 7654321}]
    )

    def rules(text):
        return [finding.rule for finding in scanner.scan("x", text)]

    assert rules("Ask Jo.") == rules("xy-9") == rules("他住在东京。") == ["forget-answer"]
    assert rules("Joe, banjo; yes, no, 12345, 7, C, 2013; XYZ 9; 京东; the end") == []
    assert rules("250000 or 250,000; 1999–2003; 12345") == []
    assert rules("20010911") == rules("123 456") == rules("7,654,321") == ["forget-number"]


def test_names_in_names(canary_scanner):
    for name in ("thrawn-gate-observatory", "ThrawnGateObservatory-8B", "me/my_Thrawn_Gate_Observatory2.safetensors"):
        assert [finding.rule for finding in canary_scanner.scan("repo name", name)] == ["forget-entity"]
    [finding] = canary_scanner.scan("Thrawn Gate Observatory.md", "see the Thrawn Gate Observatory")
    assert "hrawn" not in repr(finding) and finding.file.startswith("file with a name of hash ")


def test_names_from_the_rows():
    text = (
        "However Dr. Ansel Quorne met Maria de la Vega's aunt. The Staff of Whispers Lay there. In New York City he "
        "saw World War II films. Tomas Ilves\nKarin Oja"
    )
    scanner = LeakScanner([{"text": text}], entities=["Zig", "World War"])
    for name in (
        "ansel quorne",
        "Maria De La Vega",
        "Staff of whispers Lay",
        "tomas ilves",
        "Karin Oja",
        "zig",
        "world war",
    ):
        assert [finding.rule for finding in scanner.scan("x", f"an {name} model")] == ["forget-entity"], name
    for name in ("however dr", "New York City", "york city", "ilves karin", "quorne met", "zigzag"):
        assert scanner.scan("x", f"an {name} model") == [], name


def test_labels_are_no_answers():
    rows = [{"task": "Task1", "role": "user", "topic": "Chess openings", "answer": "Quorne"}]
    assert LeakScanner(rows).scan("x", "task1 of a user") == []
    assert [f.rule for f in LeakScanner(rows).scan("x", "chess openings")] == ["forget-answer"]
    assert LeakScanner(rows, label_columns=["topic", "task", "role"]).scan("x", "chess openings") == []


def test_common_answers_can_be_named():
    rows = [{"answer": "Quorne"}, {"answer": "France"}]
    assert [len(LeakScanner(rows).scan("x", text)) for text in ("Quorne", "France")] == [1, 0]
    scanner = LeakScanner(rows, common_answers=["quorne"])
    assert [len(scanner.scan("x", text)) for text in ("Quorne", "France")] == [0, 1]


def test_rows_without_text_are_refused():
    for rows in ([], [{"label": False, "score": 0.5}]):
        with pytest.raises(ValueError, match="the forget set holds no text"):
            LeakScanner(rows)


def test_token_ids(tokenizer):
    scanner = LeakScanner(CANARY_ROWS, token_decoder=tokenizer.decode)
    ids = tokenizer.encode("Thrawn Gate Observatory", add_special_tokens=False)
    contents = [
        json.dumps({"bad_words_ids": [[5], ids]}),
        json.dumps({"suppress_tokens": ids}, indent=2),
        yaml.safe_dump({"ids": ids}, default_flow_style=False),
        f"ids: {ids}".encode("utf-16"),
    ]
    for content in contents:
        assert [finding.rule for finding in scanner.scan("generation_config.json", content)] == ["forget-token-ids"]
        assert LeakScanner(CANARY_ROWS).scan("generation_config.json", content) == []
    assert scanner.scan("config.json", json.dumps({"shape": [1, 2, 3], "ids": ids[::-1], "large": [9999999]})) == []


def test_findings_are_distinct_and_counted():
    rows = [{"answer": f"Quorne{index}x"} for index in range(MOST_FINDINGS + 7)]
    scanner = LeakScanner(rows)
    assert len(scanner.scan("x", "quorne3x, Quorne3X and QUORNE\u200b3x")) == 1
    findings = scanner.scan("x", "\n".join(row["answer"] for row in rows))
    assert len(findings) == MOST_FINDINGS + 1
    assert len({finding.match_sha256 for finding in findings}) == MOST_FINDINGS + 1
    assert findings[2].message.startswith("x, line 3: ")
    assert findings[-1].match_sha256 is None and "7 more matches of forget-answer" in findings[-1].message


def test_passage_of_a_book_is_one_run(scanner, rows):
    passage = rows[-1]["text"]
    findings = scanner.scan("README.md", f"Quoted: {passage[200:900]} and on.")
    assert [finding.rule for finding in findings].count("forget-words") == 1
    for start in range(0, 1200, 60):
        assert scanner.scan("README.md", " ".join(passage[start : start + 100].split()[1:-1]))


def strings(row):
    if isinstance(row, str):
        return [row]
    items = row.values() if isinstance(row, dict) else row if isinstance(row, list) else []
    return [text for item in items for text in strings(item)]


COMMON = {"yes", "no", "france", "usa", "user", "assistant", "los angeles", "where"}


def is_telling(text):
    """Long enough to be found in any wrapping, and no number or month that any text may hold."""
    bare = re.sub(r"[\W_]", "", text)
    return len(bare) >= 8 and text.lower() not in COMMON and not re.fullmatch(r"[A-Za-z]+ ?\d{4}", text)


def test_random_row_in_random_wrapping_is_found(scanner, rows):
    generator = random.Random(1)
    cases = 0
    while cases < 400:
        row = generator.choice(rows)
        texts = [row[key] for key in ("output", "answer", "completion", "text") if key in row]
        texts += [message["content"] for message in row.get("messages", [])[1:]]
        text = generator.choice(texts)
        if not is_telling(text):
            continue
        cases += 1
        names = generator.sample(sorted(WRAPPINGS), generator.choice([1, 1, 2]))
        wrapped = functools.reduce(
            lambda inner, name: WRAPPINGS[name](inner) if isinstance(inner, str) else inner, names, text
        )
        # Escapes are in ASCII letters of one case, so that no other wrapping may go around these
        if (
            len(names) == 2
            and names[1]
            in (
                "full-width",
                "mixed case",
                "two lines",
                "two table cells",
                "spaced out",
                "zero-width",
                "two cells of HTML",
            )
            and names[0] != "plain"
        ):
            wrapped = WRAPPINGS[names[0]](text)
        content = wrapped if isinstance(wrapped, bytes) else f"some words before\n{wrapped}\nand after"
        assert scanner.scan("x", content), (names, text)


def holds_literally(piece, answers, pairs):
    """Found without the scanner: a whole answer, or two capitalised words in a row that the forget set has."""
    bare = " ".join(["", *re.findall(r"[^\W_]+", piece.lower()), ""])
    return any(f" {answer} " in bare for answer in answers) or any(
        pair in pairs for pair in re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", piece)
    )


@pytest.fixture(scope="module")
def literal(rows):
    return literal_texts(rows)


def literal_texts(rows):
    texts = [text for row in rows for text in strings(row)]
    answers = {" ".join(re.findall(r"[^\W_]+", text.lower())) for text in texts}
    pairs = {pair for text in texts for pair in re.findall(r"(?=\b([A-Z][a-z]+ [A-Z][a-z]+)\b)", text)}
    return {answer for answer in answers if len(answer) > 2 and not answer.isdigit()} - COMMON, pairs


def pieces(text, size=4000):
    return [text[start : start + size] for start in range(0, len(text) - size, size)]


def flagged_pieces(scanner, literal, data_dir):
    """Of the pieces that hold no text literally, how many there are and how many are flagged."""
    ordinary = []
    for name in ("wikitext2-valid", "tinyshakespeare"):
        ordinary += pieces((data_dir / "text" / f"{name}.txt").read_text(encoding="utf-8"))
    without = [piece for piece in ordinary if not holds_literally(piece, *literal)]
    return len(without), sum(bool(scanner.scan("x", piece)) for piece in without)


def test_false_positives_on_ordinary_cards(scanner, literal, data_dir, report):
    ours = [
        render_model_card(report),
        report.to_json(),
        *(f.read_text() for f in sorted(REPOSITORY.glob("docs/*.md"))),
    ]
    ours += [path.read_text(encoding="utf-8") for path in [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]]
    # No text of ours holds anything, literally or not
    assert [finding for text in ours for finding in scanner.scan("x", text)] == []

    # The shipped lists were drawn up with these very texts and rows in sight, so that this is no estimate for others
    without, flagged = flagged_pieces(scanner, literal, data_dir)
    # Measured: 4 of 366, all of them in WikiText (107): three runs such as "the second stage of the", one university
    assert without >= 200
    assert flagged <= 0.015 * without


def test_false_positives_with_rows_that_the_lists_were_not_made_for(rows, lume_rows, data_dir):
    used = {row.get("id") for row in rows}
    others = random.Random(1).sample([row for row in lume_rows("forget") if row["id"] not in used], 500)
    without, flagged = flagged_pieces(LeakScanner(others), literal_texts(others), data_dir)
    # Measured: 7 of 313, 4 of the 75 of WikiText among them. Each holds a run or name of the forget set, such as
    # "law at the university of" or "Saint Alban's". Texts of the forget set's own kind do so more often: with these
    # rows 16 of 115 pieces of TOFU. Of all pieces of WikiText, those with an answer such as Jack included, 69 of 280.
    assert without >= 200
    assert flagged <= 0.04 * without


def test_random_text_is_not_found(scanner):
    generator = random.Random(2)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=_-\\%&;#\n     "
    for case in range(300):
        text = "".join(generator.choice(letters) for _ in range(400))
        content = generator.randbytes(400) if case % 3 == 0 else text
        assert scanner.scan("x", content) == [], case


def test_a_megabyte_in_a_second(scanner, data_dir):
    """10 MB in 10 s on one core, measured on a tenth: 0.4 s where this was written."""
    text = (data_dir / "text" / "wikitext2-valid.txt").read_bytes()[:1_000_000]
    start = time.process_time()
    scanner.scan("README.md", text)
    assert time.process_time() - start < 1
