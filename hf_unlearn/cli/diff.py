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
Compare two models on disk, tensor by tensor, and optionally write what turns one into the other.

```bash
hf-unlearn diff BASE NEW
hf-unlearn diff BASE ADAPTER                        # what merging a LoRA adapter would change
hf-unlearn diff BASE NEW --manifest DIR --sign KEY  # for `hf-unlearn apply`
```

The exit code is 0 whether the models differ or not, 1 where a file is broken, 2 where the two cannot be compared.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

from tqdm import tqdm

from hf_unlearn.cards.diff import ModelDiff, TensorDiff, check_same_architecture, diff_models
from hf_unlearn.cards.manifest import MANIFEST_NAME, EditManifest, build_manifest
from hf_unlearn.cards.report import REPORT_NAME, UnlearningReport
from hf_unlearn.cards.signing import sign_manifest
from hf_unlearn.cards.tensor_files import ModelTensors, open_model

from . import UsageError


# Lines of the table, without `--all`
ROWS = 20


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. `{self.prog} --help` lists the arguments.")


def make_parser() -> Parser:
    parser = Parser(
        prog="hf-unlearn diff",
        description="Compare two models on disk, tensor by tensor. Exit code 0 whether they differ or not.",
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="Folder of the model before; alone, it is listed.")
    parser.add_argument("new", metavar="NEW", nargs="?", help="Folder of the model after, or of a LoRA adapter.")
    parser.add_argument("--all", action="store_true", help=f"List all tensors that changed, not {ROWS}.")
    parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
    parser.add_argument("-q", "--quiet", action="store_true", help="Print the totals only, and no progress bar.")
    parser.add_argument("--manifest", metavar="DIR", help="Write the edit from BASE to NEW into this new folder.")
    parser.add_argument("--sign", metavar="KEY", help="Sign the manifest with this SSH key.")
    parser.add_argument(
        "--data_commitment", "--data-commitment", metavar="HMAC", help="HMAC-SHA256 of the forget set, to record."
    )
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    if args.manifest is None and (args.sign or args.data_commitment):
        raise UsageError("--sign and --data_commitment are about a manifest: add --manifest DIR.")
    if args.manifest is not None and args.new is None:
        raise UsageError("A manifest is made of two models: pass BASE and NEW.")
    if args.sign is not None and not os.path.isfile(args.sign):
        raise UsageError("The key to sign with does not exist: check the path.")
    if args.data_commitment is not None and not re.fullmatch(r"[0-9a-f]{64}", args.data_commitment):
        raise UsageError("--data_commitment takes the 64 hexadecimal digits of an HMAC-SHA256.")
    with ExitStack() as stack:
        base, new = (
            None if path is None else stack.enter_context(open_folder(path, role))
            for path, role in ((args.base, "BASE"), (args.new, "NEW"))
        )
        if new is None:
            base, new = None, base
        if base is not None:
            try:
                check_same_architecture(base, new)
            except ValueError as error:
                raise UsageError(str(error)) from error
        manifest = None
        with progress_bar("Comparing", new.size + (0 if base is None else base.size), args.quiet) as progress:
            if args.manifest is None:
                difference = diff_models(base, new, progress)
            else:
                manifest, difference = build_manifest(
                    base,
                    new,
                    args.manifest,
                    settings=_settings(args.new),
                    data_commitment=args.data_commitment,
                    progress=progress,
                )
        if args.sign:
            sign_manifest(args.manifest, args.sign)
    if args.json:
        content = difference.to_dict()
        if manifest is not None:
            content["manifest"] = os.path.join(args.manifest, MANIFEST_NAME)
        print(json.dumps(content, indent=2, allow_nan=False))
        return 0
    lines = [] if args.quiet else as_table(difference, None if args.all else ROWS)
    lines += totals(difference, is_alone=base is None)
    if manifest is not None:
        lines.append(_manifest_line(manifest, bool(args.sign)))
    print("\n".join(lines))
    return 0


def open_folder(path: str, role: str) -> ModelTensors:
    """
    Opens a model on disk; snapshots in the Hub's cache are links into it, which are followed.

    Raises:
        `UsageError`: there is no such folder.
    """
    if not os.path.isdir(path):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not path.startswith(".") and not os.path.exists(path):
            raise UsageError(
                f"{role} is no folder here. If it is a model on the Hub, `hf download` it first and pass the folder "
                "that this prints."
            )
        raise UsageError(f"{role} is not a folder: pass the folder of a model or an adapter.")
    return open_model(path, hub_links=True)


@contextmanager
def progress_bar(title: str, size: int, is_quiet: bool) -> Iterator[Callable[[int], None]]:
    """Counts bytes on stderr."""
    with tqdm(
        total=size, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=is_quiet, leave=False
    ) as bar:
        yield bar.update


def as_table(difference: ModelDiff, limit: int | None) -> list[str]:
    """What moved, the furthest first, and below it what was not compared."""
    moved = difference.moved
    lines = []
    if moved:
        rows = [("changed tensor", "‖Δ‖/‖W‖", "max |Δ|", "changed", "of")]
        rows += [
            (
                tensor.name + _remark(tensor),
                _number(tensor.relative_norm),
                _number(tensor.max_abs),
                f"{tensor.changed_parameters:,}",
                f"{tensor.parameters:,}",
            )
            for tensor in moved[:limit]
        ]
        lines += _aligned(rows)
        if limit is not None and len(moved) > limit:
            lines.append(f"... and {len(moved) - limit:,} more (--all lists them)")
        lines.append("")
    groups = {
        "same numbers in other bits": [
            tensor for tensor in difference.with_status("changed", "other_dtype") if not tensor.changed_parameters
        ],
        "other shape": difference.with_status("other_shape"),
        "only in BASE": difference.with_status("only_in_base"),
        "only in NEW": difference.with_status("only_in_new"),
        "in the adapter": difference.adapter_tensors,
    }
    for title, tensors in groups.items():
        if tensors:
            rows = [(title, "type", "shape")]
            rows += [(tensor.name, *_described(tensor)) for tensor in tensors[:limit]]
            lines += _aligned(rows)
            if limit is not None and len(tensors) > limit:
                lines.append(f"... and {len(tensors) - limit:,} more (--all lists them)")
            lines.append("")
    return lines


def totals(difference: ModelDiff, is_alone: bool) -> list[str]:
    """The lines that a reader needs who reads no table."""
    if is_alone:
        lines = [f"{len(difference.tensors):,} tensors, {difference.total_parameters:,} parameters."]
    else:
        moved = difference.moved
        changed = sum(tensor.changed_parameters for tensor in moved)
        counts = {
            "identical bit for bit": len(difference.with_status("identical")),
            "not touched by the adapter": len(difference.with_status("not_compared")),
            "of another shape": len(difference.with_status("other_shape")),
            "only in BASE": len(difference.with_status("only_in_base")),
            "only in NEW": len(difference.with_status("only_in_new")),
        }
        counts = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        share = changed / difference.total_parameters if difference.total_parameters else 0.0
        lines = ["The models are the same, bit for bit."] if difference.is_same else []
        lines.append(f"{len(moved):,} of {len(difference.tensors):,} tensors changed{counts and ', '}{counts}.")
        try:
            footprint = difference.footprint()
            size = f"‖Δ‖/‖W‖ {footprint.relative_norm:.3g} over the changed tensors, max |Δ| {footprint.max_abs:.3g}"
        except ValueError:
            size = "no norm, because values are not finite"
        lines.append(f"{changed:,} of {difference.total_parameters:,} parameters changed ({share:.2%}); {size}.")
    if difference.not_finite:
        lines.append(
            f"NaN or infinite values in {len(difference.not_finite):,} tensors: {', '.join(difference.not_finite[:3])}"
            f"{' ...' if len(difference.not_finite) > 3 else ''}."
        )
    return lines


def _remark(tensor: TensorDiff) -> str:
    if tensor.status == "other_dtype":
        return f" ({tensor.base.dtype} → {tensor.new.dtype})"
    return "" if tensor.start is None else f" (from {tensor.start})"


def _described(tensor: TensorDiff) -> tuple[str, str]:
    sides = [side for side in (tensor.base, tensor.new) if side is not None]
    return tuple(
        " → ".join(dict.fromkeys(texts))
        for texts in ([side.dtype for side in sides], ["×".join(map(str, side.shape)) or "scalar" for side in sides])
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in columns)
        for columns in (enumerate(zip(row, widths, strict=True)) for row in rows)
    ]


def _settings(folder: str) -> dict[str, float | int | str | bool | None] | None:
    """The settings in the report that lies with the model, if there is one: without those that are texts."""
    path = os.path.join(folder, REPORT_NAME)
    if not os.path.isfile(path):
        return None
    method = UnlearningReport.load(path).method
    if method is None:
        return None
    return {
        name: value
        for name, value in method.settings.items()
        if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.@+-]{0,99}", value)
    }


def _manifest_line(manifest: EditManifest, is_signed: bool) -> str:
    size = 0 if manifest.edit_file is None else manifest.edit_file.size
    return (
        f"Manifest written, {'signed' if is_signed else 'not signed: integrity only, no author'}; the edit takes "
        f"{size:,} bytes of {sum(file.size for file in manifest.new_files):,}."
    )
