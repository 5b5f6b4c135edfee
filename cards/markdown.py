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
"""Text made literal in Markdown."""

import re


def md_escape(text: str) -> str:
    """Make text literal in Markdown prose."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_~$#\[\]])", r"\\\1", text)


def md_code(text: str) -> str:
    """Make text a code span, within a longer run of backticks than it holds."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def md_cell(markdown: str) -> str:
    """Keep Markdown that is already escaped within its table cell. In tables, this holds for code spans too."""
    return markdown.replace("|", r"\|")


def number(value: float | None) -> str:
    """A measure to three digits, large ones as integers; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def integer(value: float) -> str:
    """A count in full."""
    return f"{round(value):,}"


def share(recovered: float | None) -> str:
    """A share in percent, clipped for display only: the report keeps what was measured."""
    return "–" if recovered is None else f"{100 * min(max(recovered, 0.0), 1.0):.1f}%"
