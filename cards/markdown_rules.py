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
"""The rules of Markdown that is released: no HTML, no link but to https or within the release."""

import html
import re
from dataclasses import dataclass

from hf_unlearn.cards.findings import Finding


BEGIN_MARKER = "<!-- hf-unlearn:begin v1 -->"
END_MARKER = "<!-- hf-unlearn:end -->"

# What the template of the model card folds long tables with; harmless as long as they carry no attribute.
_TAGS = ("details", "summary", "br", "sub", "sup")
_LINE_END = re.compile(r"\r\n|\n|\r")
_OPENING = re.compile(r"( {0,3})(`{3,}(?=[^`]*$)|~{3,})")
_INDENTED = re.compile(r" {4}| {0,3}\t")
_HTML_START = re.compile(r"[ >]*<[A-Za-z/!?]")
# One that ends in its line; any other is a finding in itself.
_COMMENT = re.compile(r" {0,3}<!--.*-->.*")
_TAG = re.compile(r"</?([A-Za-z][A-Za-z0-9-]*) ?/?>")
_AUTOLINK = re.compile(r"<([A-Za-z][A-Za-z0-9+.-]*:[^\s<>]*)>")
_DESTINATION = re.compile(r"\]\(\s*(?:<([^<>\n]*)>|([^\s<>)][^\s)]*))")
_DEFINITION = re.compile(
    r"^[ \t>*+\-\d.)]*\[(?:\\.|[^\]\\]){1,999}\]:[ \t]*\n?[ \t>]*<?([^\s>]+)", re.MULTILINE | re.DOTALL
)
# What becomes a link without any brackets.
_BARE = re.compile(r"(?<![\w+.-])((?:http|ftps?)://\S+|(?:mailto|xmpp):\S+@\S+)|(?<![\w/.:@-])www\.\w[\w-]*\.\w", re.I)
_IMAGE = re.compile(r"!\[[^\]]*\]\(\s*<?([^\s<>)]+)")


@dataclass(frozen=True)
class Line:
    """A line of Markdown, its end included, and whether every reading of it takes it for code."""

    text: str
    start: int
    is_code: bool
    is_html: bool


def split_lines(text: str) -> list[Line]:
    """
    The lines of a text, and which of them lie within a fenced code block or within a block of HTML.

    What is a fence depends on the list, the quote or the HTML that it stands in. A line counts as code only where it
    lies within a fence in every reading: whether or not indented fences open a block, whether or not HTML keeps them
    from it. So nothing hides behind the difference.

    Args:
        text (`str`):
            Markdown.

    Returns:
        `list[Line]`: All of the text, in order; the fences themselves count as code.
    """
    lines, start = [], 0
    readings = [_Reading(indent, html_blocks) for indent in (0, 3) for html_blocks in (True, False)]
    in_html = False
    while start < len(text):
        match = _LINE_END.search(text, start)
        end = match.end() if match else len(text)
        content = text[start : match.start() if match else end]
        # A list, so that all of them are asked: each keeps its place
        answers = [reading.is_code(content) for reading in readings]
        is_code = all(answers)
        is_html = not is_code and bool(content.strip(" \t>")) and (in_html or bool(_HTML_START.match(content)))
        lines.append(Line(text[start:end], start, is_code, is_html))
        in_html = is_html and (in_html or not _COMMENT.fullmatch(content))
        start = end
    return lines


class _Reading:
    """One way to read fences: the widest indent that may open one, and whether a block of HTML keeps them closed."""

    def __init__(self, indent: int, html_blocks: bool) -> None:
        self._indent, self._html_blocks = indent, html_blocks
        self._fence, self._in_html = "", False

    def is_code(self, content: str) -> bool:
        if self._fence:
            mark = content.strip(" \t")
            if set(mark) == {self._fence[0]} and len(mark) >= len(self._fence) and not _INDENTED.match(content):
                self._fence = ""
            return True
        # A block of HTML lasts until an empty line, a comment until its end, and both know no fences
        begins = bool(_HTML_START.match(content)) and not _COMMENT.fullmatch(content)
        self._in_html = bool(content.strip(" \t>")) and (self._in_html or begins)
        opening = _OPENING.match(content)
        if opening and len(opening[1]) <= self._indent and not (self._html_blocks and self._in_html):
            self._fence = opening[2]
        return bool(self._fence)


def check_markdown(file: str, text: str, names: set[str] | None = None) -> list[Finding]:
    """
    Whether Markdown has HTML or links that it should not have.

    Code is left alone where every reading of the text takes it for code. HTML may be `<details>` and `<summary>` (and
    `<br>`, `<sub>`, `<sup>`) without attributes, and the markers of the generated part; a link is relative or leads to
    https.

    Args:
        file (`str`):
            What the findings call it: its path relative to the folder.
        text (`str`):
            Markdown, without front matter.
        names (`set[str]`, *optional*):
            Paths of the files that are released: with it, a picture within the release has to be one of them.

    Returns:
        `list[Finding]`: Rules `markdown-html` and `markdown-link`, one finding for each line at fault.
    """
    findings = []
    for number, line in _visible(text):
        if _has_html(line):
            message = f"line {number} has HTML that is not escaped: write &lt; for <, or put it into a code block."
            findings.append(Finding("markdown-html", file, message))
    blocks = _visible(text, whole=True)
    for number, block in blocks:
        for pattern in (_DESTINATION, _DEFINITION, _AUTOLINK, _BARE):
            for match in pattern.finditer(block):
                destination = next((group for group in match.groups() if group is not None), "http:")
                if not _is_safe(destination):
                    at = number + block.count("\n", 0, match.start())
                    message = f"line {at} has a link that is neither relative nor to https: change or remove it."
                    findings.append(Finding("markdown-link", file, message))
        for match in _IMAGE.finditer(block) if names is not None else ():
            target = match[1].removeprefix("./")
            if ":" not in target and target not in names:
                at = number + block.count("\n", 0, match.start())
                message = f"line {at} shows a picture that is not released: add it, or remove the line."
                findings.append(Finding("markdown-link", file, message))
    return list(dict.fromkeys(findings))


def _visible(text: str, whole: bool = False) -> list[tuple[int, str]]:
    """
    What is not code, as (line number, text): lines, or with `whole` one text of all lines with `\\n` between them.

    A code span may go over several lines of a paragraph, or end with the block that it stands in, which takes a parser
    of Markdown to tell: what is code only in one of the two readings is not left out.
    """
    lines = split_lines(text)
    contents = [line.text.rstrip("\r\n") for line in lines]
    shown = ["" if line.is_code else content for line, content in zip(lines, contents, strict=True)]
    start = 0
    blanked = list(shown)
    while start < len(lines):
        end = start
        while end < len(lines) and shown[end].strip() and not lines[end].is_html:
            end += 1
        if end > start:
            paragraph = _without_spans("\n".join(shown[start:end])).split("\n")
            for at in range(start, end):
                alone = _without_spans(shown[at])
                pairs = zip(shown[at], alone, paragraph[at - start], strict=True)
                blanked[at] = "".join(" " if one == two == "\0" else own for own, one, two in pairs)
        start = max(end, start + 1)
    return [(1, "\n".join(blanked))] if whole else list(enumerate(blanked, start=1))


def _without_spans(text: str) -> str:
    """The text with a NUL for every character of a code span. A span with a bar may be two cells of a table."""
    text = text.replace("\0", " ")
    runs = [(match.start(), match.end()) for match in re.finditer("`+", text)]
    later: dict[int, list[int]] = {}
    for index in range(len(runs) - 1, -1, -1):
        later.setdefault(runs[index][1] - runs[index][0], []).append(index)
    parts, shown, index = [], 0, 0
    while index < len(runs):
        start, end = runs[index]
        backslashes = start - len(text[max(0, start - 99) : start].rstrip("\\")) - max(0, start - 99)
        start += backslashes % 2
        # The first later run of the same length closes; those that were passed are never asked for again
        closers = later.get(end - start, [])
        while closers and closers[-1] <= index:
            closers.pop()
        if start == end or not closers:
            index += 1
            continue
        index = closers[-1] + 1
        stop = runs[closers[-1]][1]
        if not re.search(r"(?<!\\)\|", text[start:stop]):
            parts += [text[shown:start], re.sub(r"[^\n]", "\0", text[start:stop])]
            shown = stop
    return "".join(parts) + text[shown:]


def _has_html(line: str) -> bool:
    line = line.replace(BEGIN_MARKER, "").replace(END_MARKER, "")
    for match in re.finditer(r"<(?=[A-Za-z/!?])", line):
        tag = _TAG.match(line, match.start())
        if not (tag and tag[1].lower() in _TAGS) and not _AUTOLINK.match(line, match.start()):
            return True
    return False


def _is_safe(destination: str) -> bool:
    """Whether a link is relative or leads to https, however it is spelled."""
    destination = re.sub(r"[\x00-\x20\x7f]", "", html.unescape(destination))
    destination = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", destination)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", destination)
    if scheme:
        # No user and password before the host
        return bool(re.match(r"https://[^/?#@\\]+([/?#]|$)", destination, re.I))
    parts = re.split(r"[?#]", destination)[0].split("/")
    return (
        not destination.startswith(("/", "~"))
        and "\\" not in destination
        and ".." not in parts
        and ":" not in parts[0]
    )
