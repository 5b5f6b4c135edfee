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
"""What a text says once it is decoded: escapes undone, base64 and hex runs read, and all spellings folded into one."""

import binascii
import html
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


# How many encodings may lie within each other. Every step shortens what it decodes, so that the work stays bounded.
DEPTH = 3

_WORD, _IDEOGRAPH, _DROPPED, _UPPER, _DIGIT = 1, 2, 4, 8, 16
# Scripts without spaces, in which each character counts as a word
_IDEOGRAPHS = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
# Letters by category, but invisible
_FILLERS = {0x115F, 0x1160, 0x3164, 0xFFA0}

# By code point, filled in as characters are met: a table of all of Unicode would cost a second at import
_known = np.zeros(0x110000, dtype=bool)
_flags = np.zeros(0x110000, dtype=np.uint8)
_folded = np.zeros(0x110000, dtype=np.uint32)


@dataclass(frozen=True)
class View:
    """
    One reading of a content.

    Parameters:
        text (`str`):
            What it says, read this way.
        form (`str`):
            How it was read, for a message: empty for the text as it stands.
        binary (`bool`):
            Whether bytes without meaning may touch the text, so that a word need not end where a match does.
    """

    text: str
    form: str = ""
    binary: bool = False


@dataclass(frozen=True)
class Folded:
    """
    A text without spaces, punctuation, case, accents and invisible characters.

    Parameters:
        characters (`np.ndarray`):
            Code points of all letters and digits, one after the other, uint32.
        starts (`np.ndarray`):
            Where each word begins in `characters`, and as the last entry where the last one ends, int64.
        seams (`np.ndarray`):
            Where a word changes from small to capital letters or between letters and digits, as in `aNameInCode2`.
        line_ends (`np.ndarray`):
            How many characters come before each line break.
    """

    characters: np.ndarray
    starts: np.ndarray
    seams: np.ndarray
    line_ends: np.ndarray

    def text(self, start: int, end: int) -> str:
        """The characters from `start` to `end`, words apart."""
        first, last = np.searchsorted(self.starts, [start, end], "left")
        inner = self.starts[first:last] - start
        text = to_text(self.characters[start:end])
        edges = [0, *inner[inner > 0].tolist(), end - start]
        return " ".join(text[left:right] for left, right in zip(edges, edges[1:], strict=False))


def to_text(codes: np.ndarray) -> str:
    """Code points to a string."""
    return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def _to_codes(text: str) -> np.ndarray:
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _learn(codes: np.ndarray) -> None:
    present = np.zeros(len(_known), dtype=bool)
    present[codes] = True
    for code in np.flatnonzero(present & ~_known).tolist():
        _flags[code], _folded[code] = _properties(code)
        _known[code] = True


def _properties(code: int) -> tuple[int, int]:
    character = chr(code)
    category = unicodedata.category(character)
    # Format characters (zero-width, bidi, soft hyphen), and marks: an accent goes, as that of a composed letter does
    if category in ("Cf", "Mn", "Mc", "Me") or code in _FILLERS:
        return _DROPPED, 0
    digit = unicodedata.decimal(character, None)
    if digit is not None:
        return _WORD | _DIGIT, ord("0") + digit
    if not character.isalnum():
        return 0, 0
    flags = _WORD | (_UPPER if character.isupper() else 0)
    if any(first <= code <= last for first, last in _IDEOGRAPHS):
        flags |= _IDEOGRAPH
    # The first of a Hangul syllable's parts would not stand for the syllable
    hangul = 0xAC00 <= code <= 0xD7A3
    letter = character if hangul else unicodedata.normalize("NFD", character)[0]
    return flags, ord(letter.casefold()[0])


_learn(np.arange(128))


def is_ideograph(word: str) -> bool:
    """Whether a word of a folded text is one character of a script without spaces."""
    return len(word) == 1 and bool(_flags[ord(word)] & _IDEOGRAPH)


def visible(text: str) -> str:
    """The text in NFKC, without zero-width, bidi and other invisible characters and without combining marks."""
    if text.isascii():
        return text
    codes = _to_codes(text)
    _learn(codes)
    # Before NFKC, whose sorting of marks takes quadratic time on a long run of them
    kept = to_text(codes[(_flags[codes] & _DROPPED) == 0])
    return unicodedata.normalize("NFKC", kept).replace("ß", "ss").replace("ẞ", "SS")


def fold(text: str) -> Folded:
    """
    Folds all spellings of a text into one.

    Args:
        text (`str`): Any text; lone surrogates count as separators.

    Returns:
        [`Folded`]: Letters and digits in NFKC, casefolded, digits of all scripts as ASCII, accents and invisible
        characters dropped, and all else a boundary of words.

    Example:

    ```python
    >>> from hf_unlearn.cards.decoding import fold
    >>> folded = fold("Hsiao\\u200b **Yün**-Ｈｗａ")
    >>> folded.text(0, len(folded.characters))
    'hsiao yun hwa'

    ```
    """
    codes = _to_codes(visible(text))
    if codes.dtype != np.uint8:
        _learn(codes)
        # NFKC may bring marks of its own
        codes = codes[(_flags[codes] & _DROPPED) == 0]
    flags = _flags[codes]
    word = (flags & _WORD) != 0
    before = np.concatenate([np.zeros(1, np.uint8), flags[:-1]])
    inside = word & ((before & _WORD) != 0)
    alone = ((flags | before) & _IDEOGRAPH) != 0
    start = word & (~inside | alone)
    turn = ((flags & ~before & _UPPER) != 0) | (((flags ^ before) & _DIGIT) != 0)
    seam = inside & turn & ~alone
    line_ends = np.cumsum(word)[codes == 10]
    return Folded(
        characters=_folded[codes[word]],
        starts=np.append(np.flatnonzero(start[word]), np.count_nonzero(word)),
        seams=np.flatnonzero(seam[word]),
        line_ends=line_ends,
    )


def decoded_views(content: bytes | str) -> Iterator[View]:
    """
    All readings of a content.

    The text itself (UTF-8, UTF-16 and UTF-32; what is none of these is read in several ways, as binary), with JSON,
    YAML and Python escapes, HTML entities and tags and percent runs undone, and its base64 and hex runs decoded,
    within each other up to a depth of [`DEPTH`]. Compressed data, other encodings such as base32, letters of one
    script that look like those of another and images of text are not read. Of base64 runs, those shorter than 8
    characters are read only with their padding.

    Args:
        content (`bytes` or `str`): What leaves.

    Returns:
        `Iterator[View]`: The readings, each once, the text as it stands first.

    Example:

    ```python
    >>> from hf_unlearn.cards.decoding import decoded_views
    >>> [view.text for view in decoded_views("token: SHNpYW8gWXVuLUh3YQ==")][1:]
    ['Hsiao Yun-Hwa']

    ```
    """
    level = [View(content)] if isinstance(content, str) else _readings(content)
    seen = set()
    for depth in range(DEPTH + 1):
        following = []
        for view in level:
            # With the length, since Python hashes a string's memory: UTF-16 has the hash of its bytes as Latin-1
            key = len(view.text), hash(view.text)
            if key in seen:
                continue
            seen.add(key)
            yield view
            # What was unescaped was so to the end, and its runs are read
            if depth < DEPTH and view.form not in ("unescaped", "without tags"):
                following += _derived(view)
        level = following


def _readings(content: bytes) -> list[View]:
    for mark, encoding in (
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\0\0\xfe\xff", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if content.startswith(mark):
            # The bytes as well: a mark is no proof
            return [View(content.decode(encoding, "replace"), "UTF-16 or UTF-32"), *_binary_readings(content)]
    if b"\0" not in content:
        try:
            return [View(content.decode())]
        except UnicodeDecodeError:
            pass
    return _binary_readings(content)


def _binary_readings(content: bytes) -> list[View]:
    views = [
        View(content.decode("utf-8", "replace"), "", True),
        View(content.decode("latin-1"), "bytes", True),
    ]
    for encoding in ("utf-16-le", "utf-16-be"):
        views += [View(content[shift:].decode(encoding, "replace"), "UTF-16", True) for shift in (0, 1)]
    if b"\0\0\0" in content:
        views.append(View(content.replace(b"\0", b"").decode("latin-1"), "UTF-32", True))
    return views


def _derived(view: View) -> Iterator[View]:
    # As often as it takes: escapes lie within escapes, as in JSON that is a string of JSON
    text = view.text
    for _ in range(DEPTH):
        before, text = text, unescape(text)
        if text == before:
            break
    if text != view.text:
        yield View(text, "unescaped", view.binary)
    # With tags and without them: they split a text, but may also hold one
    if "<" in text:
        yield View(_TAG.sub(" ", text), "without tags", view.binary)
    if pieces := _decoded_runs(text):
        yield View("\n".join(pieces), "base64 or hex")


_PERCENT = re.compile(r"(?:%[0-9a-fA-F]{2})+|%u[0-9a-fA-F]{4}")
_ESCAPE = re.compile(
    r"(?P<bytes>(?:\\x[0-9a-fA-F]{2})+|(?:\\[0-3][0-7]{2})+)"
    r"|\\(?:u\{(?P<braced>[0-9a-fA-F]{1,6})\}|u(?P<short>[0-9a-fA-F]{4})|U(?P<long>[0-9a-fA-F]{8})"
    r"|(?P<line>\r?\n[ \t]*)|(?P<other>.))"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_ENDLESS_ENTITY = re.compile(r"&#[xX]?[0-9a-fA-F]{100,}+;?")
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,1000}>|<!--|-->")


def unescape(text: str) -> str:
    """Undoes percent runs, the escapes of JSON, YAML and Python, and HTML entities."""
    if "%" in text:
        text = _PERCENT.sub(_percent, text)
    if "\\" in text:
        text = _ESCAPE.sub(_escape, text)
        if _SURROGATE.search(text):
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if "&" in text:
        # Python refuses to read numbers of thousands of digits
        text = html.unescape(_ENDLESS_ENTITY.sub(" ", text))
    return text


def _percent(match: re.Match) -> str:
    run = match[0]
    if run.startswith("%u"):
        return chr(int(run[2:], 16))
    return _bytes_to_text(bytes.fromhex(run.replace("%", "")))


def _escape(match: re.Match) -> str:
    if run := match["bytes"]:
        if run[1] == "x":
            return _bytes_to_text(bytes.fromhex(run.replace("\\x", "")))
        return _bytes_to_text(bytes(int(octal, 8) for octal in run[1:].split("\\")))
    if code := match["braced"] or match["short"] or match["long"]:
        return chr(int(code, 16)) if int(code, 16) < 0x110000 else " "
    if match["line"]:
        return ""
    # Those for white space; every other character stands for itself
    return " " if match["other"] in "nrtfvbae0NLP_" else match["other"]


def _bytes_to_text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


_BASE64 = re.compile(r"[A-Za-z0-9+/]{8,}={0,2}|[A-Za-z0-9+/]{6,7}={1,2}")
# The runs of wrapped lines, which are read joined as well
_BASE64_LINES = re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{8,}+(?:[ \t]*\r?\n[ \t]*[A-Za-z0-9+/]{2,}+)+")
_HEX = re.compile(r"[0-9a-fA-F]{8,}")
_HEX_LINES = re.compile(r"(?<![0-9a-fA-F])[0-9a-fA-F]{8,}+(?:[ \t]*\r?\n[ \t]*[0-9a-fA-F]{2,}+)+")
_HEX_APART = re.compile(
    r"(?<![0-9a-zA-Z])(?:0x)?[0-9a-fA-F]{2}(?:[\s:,;-]{1,2}(?:0x)?[0-9a-fA-F]{2}(?![0-9a-zA-Z])){3,}"
)
_READABLE = re.compile(
    rb"(?:[\t\n\r\x20-\x7e]|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}){4,}"
)
# What is readable by chance within meaningless bytes is shorter
_READABLE_STRETCH = 12


def _decoded_runs(text: str) -> list[str]:
    """What the base64 and hex runs of a text say, where it is readable."""
    pieces = []
    text = visible(text)
    safe = text.replace("-", "+").replace("_", "/")
    for run in _BASE64.findall(safe):
        pieces += _from_base64(run.rstrip("="))
    for lines in _BASE64_LINES.findall(safe):
        pieces += _from_base64("".join(lines.split()))
    runs = [*_HEX.findall(text), *("".join(lines.split()) for lines in _HEX_LINES.findall(text))]
    runs += [re.sub(r"0x|[^0-9a-fA-F]", "", apart) for apart in _HEX_APART.findall(text)]
    for run in runs:
        for shift in (0, 1):
            digits = run[shift:]
            pieces += _readable(bytes.fromhex(digits[: len(digits) // 2 * 2]))
    return pieces


def _from_base64(run: str) -> list[str]:
    pieces = []
    # A long run, or one with signs that are punctuation elsewhere, may begin with what does not belong to it
    shifts = range(4) if len(run) >= 16 or "/" in run or "+" in run else range(1)
    for shift in shifts:
        shifted = run[shift:]
        whole = shifted[: len(shifted) - 1] if len(shifted) % 4 == 1 else shifted
        pieces += _readable(binascii.a2b_base64(whole + "=" * (-len(whole) % 4)))
    return pieces


def _readable(content: bytes) -> list[str]:
    pieces = []
    for candidate in (content, content.replace(b"\0", b"")) if b"\0" in content else (content,):
        for stretch in _READABLE.findall(candidate):
            if len(stretch) == len(candidate) or len(stretch) >= _READABLE_STRETCH:
                pieces.append(stretch.decode("utf-8", "replace"))
    return pieces
