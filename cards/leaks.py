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
The leak scanner: whether anything that leaves holds a text of the forget set.

All texts, those of the forget set and those scanned, are folded into bare letters and digits. Rolling hashes of 64
bits over these find, in one pass of NumPy, the stretches that the forget set has too: with a million stretches on
either side, chance brings about one false match in ten million scans.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from hf_unlearn.cards.decoding import Folded, View, decoded_views, fold, is_ideograph, unescape
from hf_unlearn.cards.findings import Finding, match_hash
from hf_unlearn.cards.rolling_hash import LONGEST, Block, HashSet, blocks, hash_of


WORDS = 5
CHARACTERS = 30
DIGITS = 6
# Findings of one rule in one file; the rest is counted
MOST_FINDINGS = 20
# Columns that name a row's kind. A whole value of theirs is no answer; all other rules hold for them.
LABEL_COLUMNS = frozenset({"id", "role", "task", "type", "split", "label", "language", "lang", "source"})

_MEANINGS = {
    "forget-answer": "a whole text",
    "forget-number": "a number",
    "forget-email": "an e-mail address",
    "forget-entity": "a name",
    "forget-words": f"{WORDS} or more words in a row",
    "forget-characters": f"{CHARACTERS} or more characters in a row",
    "forget-token-ids": "token ids that decode to a text",
}
# Terms shorter than this have to stand in the same words; others may be split anywhere, such as over two lines
_SPLITTABLE = 8
# Terms this long need no word boundary within bytes
_UNBOUNDED = 9
# Shorter ones stand in meaningless bytes by chance
_SHORTEST_IN_BYTES = 5


def _runs_of_words(folded: Folded, block: Block, count: int) -> tuple[int, np.ndarray]:
    """Hashes of all runs of `count` words beginning in a block, 0 for endless ones, and the first one's word."""
    first, last = np.searchsorted(folded.starts[:-1], [block.first, block.first + block.own])
    last = max(min(int(last), len(folded.starts) - count), int(first))
    starts, ends = folded.starts[first:last], folded.starts[first + count : last + count]
    short = ends - starts <= LONGEST
    return int(first), np.where(short, block.hashes(starts, np.where(short, ends, starts)), np.uint64(0))


class _Terms:
    """Texts that are found as a whole only: answers, names, addresses and numbers."""

    def __init__(self, rules: Mapping[str, set[str]], shortest: int):
        self.rules = rules
        self._shortest = shortest
        long = [term for term in rules if len(term) >= shortest]
        self._prefixes = HashSet([np.array([hash_of(term[:shortest])], np.uint64) for term in long])
        by_length = defaultdict(list)
        for term in long:
            by_length[len(term)].append(hash_of(term))
        self._by_length = {
            length: HashSet([np.array(hashes, np.uint64)]) for length, hashes in sorted(by_length.items())
        }

    def find(
        self, block: Block, starts: np.ndarray, is_end: np.ndarray, anywhere: bool = False
    ) -> Iterator[tuple[int, int]]:
        """Start and end of each match that begins at one of `starts` and ends where `is_end`."""
        starts = starts[starts + self._shortest < len(is_end)]
        starts = starts[self._prefixes.find(block.hashes(starts, starts + self._shortest))]
        for length, hashes in self._by_length.items():
            candidates = starts[starts + length < len(is_end)]
            if not anywhere:
                candidates = candidates[is_end[candidates + length]]
            for start in candidates[hashes.find(block.hashes(candidates, candidates + length))].tolist():
                yield start, start + length


@dataclass(frozen=True)
class _Match:
    rule: str
    text: str
    line: int


class LeakScanner:
    """
    Looks for the texts of a forget set in whatever leaves.

    A text of the forget set is every string in a row, those in nested messages included, and every integer of at least
    6 digits. Compared is what a content says once it is decoded and folded (see
    [`~cards.decoding.decoded_views`] and [`~cards.decoding.fold`]).

    | rule | what is found |
    |---|---|
    | `forget-answer` | a whole text of any length (up to 2048 letters; longer ones by their runs) at word boundaries |
    | `forget-number` | a number of at least 6 digits in any grouping, unless round or two years |
    | `forget-email` | an e-mail address |
    | `forget-entity` | a name given in `entities`, or found in the rows: two or more capitalised words in a row |
    | `forget-words` | 5 or more words in a row, at least two of them no function words |
    | `forget-characters` | 30 or more letters and digits in a row, where no other rule holds |
    | `forget-token-ids` | any of these in a list of token ids |

    Terms of at least 8 letters are found split anywhere, also over two lines. What it cannot see: paraphrase, parts of
    fewer than 5 words that are no name, names joined with other lower-case letters, and what
    [`~cards.decoding.decoded_views`] does not read.

    Args:
        rows (`Iterable[Mapping[str, Any]]`):
            The forget set.
        entities (`Iterable[str]`, *optional*):
            Further names, of one word or several.
        token_decoder (`Callable[[list[int]], str]`, *optional*):
            The tokenizer's `decode`. Without it lists of token ids are not read.
        common_answers (`Iterable[str]`, *optional*):
            Answers and names that any text may hold, instead of those in `common_answers.yaml`. They do not weigh
            against `entities`.
        label_columns (`Collection[str]`, *optional*):
            Columns whose whole values are no answers.

    Raises:
        `ValueError`: the rows hold no text, so that a scan would find nothing.

    Example:

    ```python
    >>> from hf_unlearn.cards.leaks import LeakScanner

    >>> scanner = LeakScanner([{"question": "Who wrote it?", "answer": "Hsiao Yun-Hwa"}])
    >>> [finding.rule for finding in scanner.scan("README.md", "by Hsiao&nbsp;Yun\\u00adHwa")]
    ['forget-answer', 'forget-entity']
    >>> scanner.scan("README.md", "by nobody")
    []

    ```
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        *,
        entities: Iterable[str] = (),
        token_decoder: Callable[[list[int]], str] | None = None,
        common_answers: Iterable[str] | None = None,
        label_columns: Collection[str] = LABEL_COLUMNS,
    ):
        self._decode_tokens = token_decoder
        shipped = _common()["answers"] | _common()["names"]
        common = shipped if common_answers is None else set(map(_bare, common_answers))
        rules, numbers = defaultdict(set), defaultdict(set)
        # Short terms by how many words they have: a script without spaces has one for each character
        short = defaultdict(set)

        def add(text: str, rule: str) -> None:
            words = _words(text)
            term = "".join(words)
            rules[term].add(rule)
            if len(term) < _SPLITTABLE:
                short[len(words)].add(term)

        words, telling, windows = [], [], []
        seen = set()
        for column, text in (pair for row in rows for pair in _texts(row)):
            if (column in label_columns, text) in seen:
                continue
            seen.add((column in label_columns, text))
            for spelling in {text, unescape(text)}:
                folded = fold(spelling)
                split = _words(spelling)
                term = "".join(split)
                if column not in label_columns and 0 < len(term) <= LONGEST // 2 and not _is_common(term, common):
                    add(spelling, "forget-answer")
                for rule, terms in (("forget-email", _EMAIL.findall(spelling)), ("forget-entity", _names(spelling))):
                    for name in terms:
                        if 5 <= len(_bare(name)) <= LONGEST // 2 and _bare(name) not in common:
                            add(name, rule)
                for number in _numbers(spelling):
                    numbers[number].add("forget-number")
                runs, facts = _runs(split)
                words.append(runs)
                telling.append(facts)
                windows += [block.windows(CHARACTERS) for block in blocks(folded.characters)]
        for name in filter(_bare, entities):
            add(name, "forget-entity")
        if not rules and not numbers and not windows:
            raise ValueError("the forget set holds no text: give rows with at least one string in a column")
        common_runs = HashSet([_runs(_words(phrase))[0] for phrase in _common_phrases()])
        facts = np.concatenate([np.zeros(0, np.uint64), *telling])
        self._words, self._telling = HashSet(words), HashSet([np.delete(facts, common_runs.find(facts))])
        self._windows = HashSet(windows)
        self._terms, self._numbers = _Terms(rules, _SPLITTABLE), _Terms(numbers, DIGITS)
        self._short_hashes = {
            count: HashSet([np.array([hash_of(term) for term in terms], np.uint64)]) for count, terms in short.items()
        }

    def scan(self, file: str, content: bytes | str) -> list[Finding]:
        """
        Looks through one content.

        Args:
            file (`str`):
                What is scanned: a path relative to the folder, or what else leaves, such as `commit message`. One that
                holds a text of the forget set is replaced by its hash in the findings.
            content (`bytes` or `str`):
                The content itself. A name that leaves is a content as well.

        Returns:
            `list[Finding]`: One for each rule and distinct match, up to 20 for each rule, and then one with the count
            of the others.
        """
        found: dict[str, dict[str, Finding]] = defaultdict(dict)
        name = self._name(file)
        for view, rule in self._views(content):
            for match in self._search(view):
                shown = rule or match.rule
                digest = match_hash(match.text)
                if digest not in found[shown]:
                    found[shown][digest] = _finding(shown, name, view, match.line, digest)
        findings = []
        for rule in _MEANINGS:
            matches = list(found[rule].values())
            findings += matches[:MOST_FINDINGS]
            if len(matches) > MOST_FINDINGS:
                more = len(matches) - MOST_FINDINGS
                findings.append(Finding(rule, name, f"{name}: {more} more matches of {rule}: remove them too"))
        return findings

    def _name(self, file: str) -> str:
        if any(True for view in decoded_views(file) for _ in self._search(view)):
            return f"file with a name of hash {hashlib.sha256(file.encode()).hexdigest()[:12]}"
        return file

    def _views(self, content: bytes | str) -> Iterator[tuple[View, str | None]]:
        """All readings; those of lists of token ids with the rule that they stand under."""
        for view in decoded_views(content):
            yield view, None
            if self._decode_tokens and not view.binary:
                lists = [[int(number) for number in _INTEGER.findall(ids)] for ids in _TOKEN_IDS.findall(view.text)]
                if lists:
                    text = "\n".join(self._decode_tokens(ids) for ids in lists)
                    yield View(text, "token ids"), "forget-token-ids"

    def _search(self, view: View) -> Iterator[_Match]:
        folded = fold(view.text)
        size = len(folded.characters)
        if not size:
            return
        hard = np.zeros(size + 1, dtype=bool)
        hard[folded.starts] = True
        edge = hard.copy()
        edge[folded.seams] = True
        digit = np.append((folded.characters >= ord("0")) & (folded.characters <= ord("9")), False)
        digit_edge = hard | ~digit | ~np.concatenate([[False], digit[:-1]])

        spans: list[tuple[str, int, int]] = []
        word_hits, telling_hits, window_hits = [], [], []
        for block in blocks(folded.characters):
            own = slice(block.first, block.first + block.own)
            matches = list(self._terms.find(block, block.first + np.flatnonzero(edge[own]), edge))
            if view.binary:
                everywhere = np.arange(block.first, block.first + block.own)
                matches += [
                    (start, end)
                    for start, end in self._terms.find(block, everywhere, edge, anywhere=True)
                    if end - start >= _UNBOUNDED
                ]
            matches += [
                (start, end)
                for start, end in self._short_matches(folded, block)
                if not view.binary or end - start >= _SHORTEST_IN_BYTES
            ]
            for start, end in matches:
                term = "".join(map(chr, folded.characters[start:end].tolist()))
                spans += [(rule, start, end) for rule in sorted(self._terms.rules[term])]
            places = block.first + np.flatnonzero((digit[:-1] & digit_edge[:-1])[own])
            spans += [("forget-number", *match) for match in self._numbers.find(block, places, digit_edge)]
            first, hashes = _runs_of_words(folded, block, WORDS)
            word_hits.append(first + self._words.find(hashes))
            telling_hits.append(first + self._telling.find(hashes))
            window_hits.append(block.first + self._windows.find(block.windows(CHARACTERS)))
        telling = np.concatenate(telling_hits)
        for first, last in _merged(np.concatenate(word_hits), WORDS):
            # A stretch as long as it goes, of which at least one run carries facts
            if np.searchsorted(telling, first) < np.searchsorted(telling, last):
                spans.append(("forget-words", int(folded.starts[first]), int(folded.starts[last])))
        covered = np.zeros(size + 1, dtype=bool)
        for _, start, end in spans:
            covered[start:end] = True
        for start, end in _merged(np.concatenate(window_hits), CHARACTERS):
            if not covered[start:end].any():
                spans.append(("forget-characters", start, end))
        for rule, start, end in sorted(spans, key=lambda span: span[1:]):
            # Numbers have one spelling, however they are grouped
            text = "".join(map(chr, folded.characters[start:end].tolist()))
            text = text if rule == "forget-number" else folded.text(start, end)
            yield _Match(rule, text, 1 + int(np.searchsorted(folded.line_ends, start, "right")))

    def _short_matches(self, folded: Folded, block: Block) -> Iterator[tuple[int, int]]:
        for count, hashes in self._short_hashes.items():
            first, runs = _runs_of_words(folded, block, count)
            for word in hashes.find(runs).tolist():
                start, end = int(folded.starts[first + word]), int(folded.starts[first + word + count])
                if end - start < _SPLITTABLE:
                    yield start, end


def _finding(rule: str, name: str, view: View, line: int, digest: str) -> Finding:
    place = f", {view.form}" if view.form else f", line {line}"
    message = (
        f"{name}{place}: {_MEANINGS[rule]} of the forget set ({rule}): remove it, or override the rule for this file "
        "and the hash of this match"
    )
    return Finding(rule, name, message, digest)


def _merged(hits: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each stretch that runs of `size` overlap to."""
    if len(hits):
        breaks = np.flatnonzero(np.diff(hits) >= size) + 1
        for part in np.split(hits, breaks):
            yield int(part[0]), int(part[-1]) + size


def _texts(value: Any, column: str = "") -> Iterator[tuple[str, str]]:
    """Every string within a row, and every long integer, with the column that it stands in."""
    if isinstance(value, str):
        yield column, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, column)
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10 ** (DIGITS - 1):
        yield column, str(value)


def _words(text: str) -> list[str]:
    folded = fold(text)
    return folded.text(0, len(folded.characters)).split()


def _bare(text: str) -> str:
    return "".join(_words(text))


@cache
def _common() -> dict[str, set[str]]:
    content = yaml.safe_load(files(__package__).joinpath("common_answers.yaml").read_text(encoding="utf-8"))
    lists = {key: content[key].split(";") for key in ("answers", "names")}
    lists |= {key: content[key].split() for key in ("words", "generic", "openers")}
    return {key: {_bare(text) for text in texts} for key, texts in lists.items()}


@cache
def _common_phrases() -> list[str]:
    content = yaml.safe_load(files(__package__).joinpath("common_answers.yaml").read_text(encoding="utf-8"))
    return content["phrases"].split(";")


def _is_common(term: str, common: set[str]) -> bool:
    short = len(term) < DIGITS and term.isdigit()
    letter = len(term) == 1 and not is_ideograph(term)
    short = short or _MONTH.fullmatch(term) is not None
    return short or letter or term in common or (term in _common()["words"])


def _runs(words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """
    Hashes of all runs of words, and of those with at least two words that carry a fact. A character of a script
    without spaces is no word here.
    """
    carries = [word not in _common()["words"] and not word.isdigit() for word in words]
    runs, telling = [], []
    for first in range(len(words) - WORDS + 1):
        run = words[first : first + WORDS]
        if sum(map(len, run)) <= LONGEST and not any(map(is_ideograph, run)):
            runs.append(hash_of("".join(run)))
            if sum(carries[first : first + WORDS]) >= 2:
                telling.append(runs[-1])
    return np.array(runs, dtype=np.uint64), np.array(telling, dtype=np.uint64)


_MONTH = re.compile(
    "(january|february|march|april|may|june|july|august|september|october|november|december)(1[0-9]|20)[0-9]{2}"
)
_EMAIL = re.compile(r"[\w.+%-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_TOKEN_IDS = re.compile(
    r"\[\s*\d{1,7}(?:\s*,\s*\d{1,7})*\s*,?\s*\]|^(?:[ \t]*-[ \t]*\d{1,7}[ \t]*(?:\r?\n|\Z)){2,}", re.MULTILINE
)
_INTEGER = re.compile(r"\d+")
_GROUPED = re.compile(r"\d+(?:[\s().\-/_']{1,2}\d+|,\d{3}(?!\d))*")
_DIGIT_RUN = re.compile(rf"\d{{{DIGITS},}}")
_YEARS = re.compile(r"(?:1\d\d\d|20\d\d)(?:1\d\d\d|20\d\d)")
_ROUND = re.compile(r"0*\d{0,2}0*")
_MOST_DIGITS = 64


def _numbers(text: str) -> set[str]:
    text = text.translate(dict.fromkeys(range(0x2010, 0x2016), "-"))
    found = set(_DIGIT_RUN.findall(text))
    for match in _GROUPED.findall(text):
        groups = _INTEGER.findall(match)
        # Single digits in a row are a list, not a number
        if max(map(len, groups)) >= 3:
            found.add("".join(groups))
    found = {"".join(str(int(digit)) for digit in number) for number in found if len(number) <= _MOST_DIGITS}
    return {
        number
        for number in found
        if len(number) >= DIGITS and not _ROUND.fullmatch(number) and not _YEARS.fullmatch(number)
    }


_NAME_WORD = re.compile(r"[^\W_]+(?:['’.-][^\W_]+)*")
_PARTICLES = frozenset("al bin da de del della den der di do dos du el ibn la le of the van von zu".split())
_TITLES = frozenset("dr mr mrs ms miss prof professor sir lady lord president".split())


def _names(text: str) -> Iterator[str]:
    """
    Names of several words: capitalised words with nothing but spaces and particles such as `van` or `of the` between
    them, function words and titles at either end left out, and a genitive's ending too.
    """
    run: list[str] = []
    end = 0
    for match in _NAME_WORD.finditer(text):
        word = re.sub(r"['’]s$", "", match[0])
        gap = text[end : match.start()]
        apart = bool(run) and (gap.strip(" \u00a0") != "" and gap not in (". ",) or len(gap) > 2)
        initial = bool(run) and gap == ". " and len(run[-1]) > 2 and run[-1].lower() not in _TITLES
        if apart or initial or not (word[0].isupper() or (run and word in _PARTICLES)):
            yield from _name(run)
            run = []
        if word[0].isupper() or (run and word in _PARTICLES):
            run.append(word)
            # A genitive ends a name
            if word != match[0]:
                yield from _name(run)
                run = []
        end = match.end()
    yield from _name(run)


def _name(run: list[str]) -> Iterator[str]:
    def is_edge(word: str) -> bool:
        bare = _bare(word)
        return not word[0].isupper() or bare in _common()["openers"] or bare in _TITLES

    first, last = 0, len(run)
    while first < last and is_edge(run[first]):
        first += 1
    while first < last and is_edge(run[last - 1]):
        last -= 1
    capitalised = [_bare(word) for word in run[first:last] if word[0].isupper()]
    if len(capitalised) >= 2 and not _common()["generic"] >= set(capitalised):
        yield " ".join(run[first:last])
