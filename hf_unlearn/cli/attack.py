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
Try to bring back what a model forgot, and compare with a control.

```bash
hf-unlearn attack out --original open-unlearning/tofu_Llama-3.2-1B-Instruct_full \
    --control open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90 \
    --forget locuslab/TOFU --forget_config forget10 --retain locuslab/TOFU --retain_config retain90 \
    --attacks relearn,quantize,prefill --budget small --output out/unlearning_report.json
```

Half of the forget rows are the attacker's (T), the other half is what the attack is scored on (V): relearning is not
asked what it was taught. The control is a model that never saw the forget set; without one, the unlearned model
unattacked stands in, and the result says so.
"""

import json
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from hf_unlearn.cards.report import REPORT_NAME

from . import UsageError, run
from .attacking import BUDGETS, Battery, SharedArguments, check_arguments, needy_attacks, read_inputs, run_battery
from .reports import check_same_model, earlier_report, new_report


if TYPE_CHECKING:
    from hf_unlearn.cards.report import AttackResult

    from .inputs import ArgumentParser, DataArguments


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Leaves the list of attacks as it is."""


@dataclass
class AttackArguments(SharedArguments):
    """
    Which attacks, and how hard; besides what all commands that attack share.

    Parameters:
        budget (`str`, *optional*, defaults to `"small"`):
            How much the attacker may spend: `"small"`, `"standard"` or `"large"`.
        output (`str`, *optional*):
            The report (JSON) to write, or to update where it exists. Values per row go to `private/` beside it.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the split of the forget rows and of what the attacks draw.
    """

    budget: str = field(
        default="small", metadata={"help": "How much the attacker may spend.", "choices": list(BUDGETS)}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "The report (JSON) to write or update; values per row go to private/ beside it."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the split of the forget rows and of what attacks draw."})


def make_parser() -> "ArgumentParser":
    from .inputs import ArgumentParser, DataArguments

    parser = ArgumentParser(
        (DataArguments, AttackArguments),
        prog="hf-unlearn attack",
        usage="%(prog)s MODEL --original BASE --forget F --retain R ...",
        formatter_class=HelpFormatter,
        epilog=list_of_attacks(),
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="A folder, a Hub id, or the folder of an adapter.")
    return parser


def list_of_attacks() -> str:
    """What `--help` says of each."""
    from hf_unlearn.attacks.table import ATTACKS

    width = max(len(name) for name in ATTACKS)
    return "attacks:\n" + "\n".join(f"  {name:<{width}}  {entry.summary}" for name, entry in ATTACKS.items())


def main(argv: list[str]) -> int:
    data_args, args, positional = make_parser().parse(argv)
    # Progress and logs go to stderr: stdout holds the result.
    with redirect_stdout(sys.stderr):
        results = attack(positional.model, data_args, args)
    print(json.dumps([asdict(result) for result in results], indent=2) if args.json else as_table(results))
    return 0


def attack(name: str | None, data_args: "DataArguments", args: AttackArguments) -> list["AttackResult"]:
    """
    Everything that the command does but printing. Nearly all that can be refused is refused before the first attack.

    Raises:
        `UsageError`: inputs are missing or do not fit; naming the fix.
    """
    from hf_unlearn.metrics.cache import ScoreCache

    names = check_arguments("attack", name, data_args, args)
    if args.output is not None and os.path.isdir(args.output):
        raise UsageError(
            f"--output {args.output!r} is a folder: name a file, such as {os.path.join(args.output, REPORT_NAME)}."
        )
    if args.control is None and (needy := needy_attacks(names)):
        raise UsageError(
            f"{', '.join(needy)} gets arbitrary text out of any model, so without --control (a model that never saw "
            "the forget set) it says nothing: give one, or leave it out of --attacks."
        )
    report = earlier_report(name, args.output)
    inputs = read_inputs(name, data_args, args)
    try:
        if report is not None:
            check_same_model(report, inputs.models["unlearned"], args.output)
        elif args.output is not None:
            sets = {"forget": inputs.forget, "retain": inputs.retain}
            report = new_report(inputs.models["unlearned"], inputs.tokenizer, sets, inputs.config)
        battery = Battery(names, [args.budget], [args.seed])
        return list(run_battery(battery, inputs, args, ScoreCache(args.cache_dir), report, args.output))
    except ValueError as error:
        raise UsageError(str(error)) from error


def as_table(results: list["AttackResult"]) -> str:
    """One line per attack, and below it what the numbers are. Budgets and seeds are shown where there are several."""
    kinds = {
        "budget": [str(result.budget["budget"]) for result in results],
        "seed": [str(result.seed) for result in results],
    }
    kinds = {name: values for name, values in kinds.items() if len(set(values)) > 1}
    heads = ("attack", *kinds, "recovered", "before", "attacked", "original", "control", "utility")
    lines = [heads]
    for place, result in enumerate(results):
        numbers = (
            result.score_before,
            result.score_after,
            result.score_original_attacked,
            result.score_control_attacked,
            result.utility_after,
        )
        cells = [result.name, *(values[place] for values in kinds.values())]
        cells.append("-" if result.recovered is None else f"{result.recovered:.2f}")
        lines.append((*cells, *("-" if value is None else f"{value:.3f}" for value in numbers)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    table = [
        "  ".join(text.ljust(width) if column == 0 else text.rjust(width) for column, (text, width) in columns)
        for columns in (enumerate(zip(line, widths, strict=True)) for line in lines)
    ]
    reasons = dict.fromkeys(f"{result.name}: {result.reason.rstrip('.')}." for result in results if result.reason)
    table += ["", *reasons]
    table += [
        "Recovered: (attacked - control) / (original - control), all three under the same attack: 0 for nothing,",
        "1 for as much as the original gives. Scores are those of forget rows that the attacker does not have.",
        *(f"Control: {control}." for control in sorted({result.control for result in results} - {"none"})),
    ]
    return "\n".join(table)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
