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
import pytest

from hf_unlearn.cards.card import render_model_card
from hf_unlearn.cards.losses import CITATIONS
from hf_unlearn.cards.markdown_rules import BEGIN_MARKER, END_MARKER, check_markdown, split_lines
from hf_unlearn.cards.merge import mark
from hf_unlearn.cards.metadata import parse_card


def rules(text, names=None):
    return [finding.rule for finding in check_markdown("README.md", text, names)]


@pytest.mark.parametrize(
    "text",
    [
        "a <script>x</script>",
        '<img src=x onerror="y">',
        "<details open>",
        "<!-- a comment -->",
        "<?php ?>",
        "\\` <b> `",  # an escaped backtick opens nothing
        "\\`` a ` <b> `",
        "`a\n` <b> `",  # the span began a line earlier
        "`a\n# <b>` b",  # the heading ends it
        "| `a | <b>` |",  # the cell ends it
        "- a\n  ```\n<b>",  # the end of the list closes the block
        "  ```\n```\n<b>",  # an indented fence that is closed by one that is not
        "<details>\n```\n<b>\n```",  # HTML lasts until an empty line, fences in it are text
        "<https://x.y>\n```\n\n```\n<b>",  # but an address is no HTML
        "``` a`b\n<b>\n```",  # no fence: a backtick follows
        "````\n```\n````\n<b>",
        "~~~\n```\n~~~\n<b>",
        "<details>\n`<b>`",
        "> ```\n<b>",
        f"{BEGIN_MARKER} `<b>`",  # the line of a comment is HTML to its end
    ],
)
def test_html_is_found_however_it_is_wrapped(text):
    assert "markdown-html" in rules(text)


@pytest.mark.parametrize(
    "text",
    [
        "a < b and c > d, `<b>`, ``<b> ` ``",
        "```html\n<b>\n```\n",
        "~~~\n<b>\n~~~",
        "````\n```\n<b>\n````",
        "&lt;b&gt; \\[x\\]",
        "<details>\n<summary>Settings</summary>\n\n```yaml\nkey: <value>\n```\n\n</details>",
        f"{BEGIN_MARKER}\n# Title\n{END_MARKER}",
        "[a](https://x.y/z?q#r) <https://x.y> https://x.y [b](figures/a.png) [c](#part) [d](./LICENSE)",
        "[a][1]\n\n[1]: https://x.y 'title'",
        "```\n[a](http://x.y)\n```",
        "`[a](http://x.y)`",
    ],
)
def test_what_is_code_or_harmless_passes(text):
    assert rules(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "[a](http://x.y)",
        "![a](//x.y/z)",
        "[a](javascript:x)",
        "[a](JaVaScRiPt:x)",
        "[a](java&#115;cript:x)",
        "[a](javascript&colon;x)",
        "[a](<javascript:x y>)",
        "[a](\n  data:text/html,x)",
        "[a](/etc/passwd)",
        "[a](../other)",
        "[a](b/../../c)",
        "[a](~/x)",
        "[a](C:\\x)",
        "[a](file:///x)",
        "[a](https://user:secret@x.y)",
        "[a](https:\\\\x)",
        "[a]: http://x.y",
        "[a\\]b]: ftp:x",
        "> - [a]:\n> http://x.y",
        "<http://x.y>",
        "<mailto:a@b.c>",
        "see http://x.y",
        "see www.example.com",
        "`a\n` [a](http://x.y) `",
    ],
)
def test_links_that_lead_elsewhere_are_found(text):
    findings = check_markdown("README.md", text)
    assert "markdown-link" in [finding.rule for finding in findings]
    assert not any("x.y" in finding.message or "secret" in finding.message for finding in findings)


def test_a_picture_has_to_be_released():
    assert rules("![a](figures/a.png)", {"figures/a.png"}) == []
    assert rules("x\n\n![a](figures/b.png)", {"figures/a.png"}) == ["markdown-link"]
    assert rules("![a](https://x.y/b.png)", set()) == []


def test_the_line_is_named():
    [finding] = check_markdown("README.md", "a\r\nb\r\n<b>\r\n")
    assert finding.message.startswith("line 3 ")
    [finding] = check_markdown("README.md", "a\n\n```\n<b>\n```\nc [x](http://y.z)\n")
    assert finding.message.startswith("line 6 ")


def test_lines_are_all_of_the_text():
    text = "a\r\n```\rb\n\n\x0b\u2028```\n<c>"
    assert "".join(line.text for line in split_lines(text)) == text


def test_cards_pass(report):
    """All that the templates write: every loss with its formula, citations, tables, folded settings."""
    _, body = parse_card(mark(render_model_card(report)))
    assert len(body) > 3000 and rules(body) == []
    report.base.architecture = "<b>[a](javascript:x)"
    _, body = parse_card(mark(render_model_card(report)))
    assert "<b>[a](javascript:x)" in body and rules(body) == []
    assert rules("\n".join(f"```bibtex\n{entry}\n```\n" for entry in CITATIONS.values())) == []


@pytest.mark.parametrize("text", ["`" * 200_000, "` `` " * 60_000, "[" * 200_000, "<" * 200_000, "](" * 100_000])
def test_long_runs_take_no_time(text):
    import time

    start = time.perf_counter()
    check_markdown("README.md", text)
    assert time.perf_counter() - start < 5
