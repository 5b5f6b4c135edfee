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
What `padding_free` saves of a step on rows of real lengths.

    python benchmarks/padding_free.py --forget tofu/forget10.json --retain tofu/retain90.json --tokenizer MODEL

A random Llama (8 layers, hidden size 256, eager attention, so that all of its products count) reads the rows with the
given tokenizer, in micro-batches of several sizes; all its weights are trained, so that forget and retain rows may run
together. Per size: tokens that are padding, and FLOPs and processor time of steps without padding over those of steps
with it, by turns. At last, what one padded forward over two sets of equally long rows takes of two.
"""

import argparse
import json
import statistics
import tempfile
import time

import datasets
import torch
from datasets import Dataset
from machine import describe_versions
from measuring import describe_machine
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.trainer_callback import PrinterCallback

from hf_unlearn import UnlearnConfig, UnlearnTrainer


LOSSES = {"simnpo + nll": (["simnpo"], ["nll"]), "npo + kl": (["npo"], ["kl"])}
SIZES = (2, 4)
LENGTHS = (8, 32, 128)


class Step:
    """A step of [`UnlearnTrainer`] over one batch after the other."""

    def __init__(self, options: argparse.Namespace, losses: str, rows: int, padding_free: bool):
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        torch.manual_seed(options.seed)
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=len(tokenizer),
            attn_implementation="eager",
        )
        forget, retain = LOSSES[losses]
        count = rows * options.repeats
        with tempfile.TemporaryDirectory() as folder:
            self.trainer = UnlearnTrainer(
                LlamaForCausalLM(config),
                args=UnlearnConfig(
                    folder,
                    use_cpu=True,
                    bf16=False,
                    seed=options.seed,
                    forget_loss=forget,
                    retain_loss=retain,
                    padding_free=padding_free,
                    per_device_train_batch_size=rows,
                    max_steps=1,
                    max_length=512,
                    save_strategy="no",
                    disable_tqdm=True,
                    report_to="none",
                ),
                train_dataset=Dataset.from_list(read_rows(options.forget, count)),
                retain_dataset=Dataset.from_list(read_rows(options.retain, count)),
                processing_class=tokenizer,
            )
            self.trainer.remove_callback(PrinterCallback)
            self.trainer.train()
        self.batches = list(self.trainer.get_train_dataloader())

    def run(self, index: int) -> None:
        trainer = self.trainer
        batches, num_items = trainer.get_batch_samples(iter([self.batches[index]]), 1, trainer.args.device)
        trainer.training_step(trainer.model_wrapped, batches[0], num_items)
        trainer.optimizer.step()
        trainer.model.zero_grad()


def read_rows(path: str, count: int) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file.read().splitlines()[:count]]


def padding_share(batches: list[dict]) -> float:
    masks = [rows["attention_mask"] for batch in batches for rows in batch.values()]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def measure(options: argparse.Namespace, losses: str, rows: int) -> dict[str, float]:
    """With padding and without, in turns on the same rows."""
    steps = {padding_free: Step(options, losses, rows, padding_free) for padding_free in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    flops = {False: 0, True: 0}
    for index in range(options.repeats):
        for padding_free, step in steps.items():
            start = time.process_time()
            step.run(index)
            seconds[padding_free].append(time.process_time() - start)
    for padding_free, step in steps.items():
        with FlopCounterMode(display=False) as counter:
            for index in range(options.repeats):
                step.run(index)
        flops[padding_free] = counter.get_total_flops()
    return {
        "padding": padding_share(steps[False].batches),
        "flops_ratio": flops[True] / flops[False],
        "seconds_ratio": statistics.median(a / b for a, b in zip(seconds[True], seconds[False], strict=True)),
        "seconds_padded": statistics.median(seconds[False]),
    }


def measure_together(options: argparse.Namespace, length: int) -> float:
    """Processor time of one forward and backward over two sets of 4 equally long rows, over that of two of them."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8)
    model = LlamaForCausalLM(config).model
    sets = torch.randint(0, config.vocab_size, (2, 4, length))

    def run(*batches: torch.Tensor) -> float:
        start = time.process_time()
        sum(model(batch).last_hidden_state.sum() for batch in batches).backward()
        return time.process_time() - start

    ratios = [run(sets.flatten(0, 1)) / run(*sets) for _ in range(options.repeats + 2)]
    return statistics.median(ratios[2:])


def format_table(results: dict[str, dict[str, float]]) -> str:
    rows = ["| losses, rows of each set | padding | FLOPs | processor time |", "|---|---|---|---|"]
    for name, result in results.items():
        rows.append(
            f"| {name} | {result['padding']:.0%} | {result['flops_ratio']:.2f} | {result['seconds_ratio']:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="What padding_free saves of a step, on rows of real lengths.")
    parser.add_argument("--forget", required=True, help="JSON lines with question and answer")
    parser.add_argument("--retain", required=True, help="the same")
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each kind (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="PATH", help="write the results here")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    results = {f"{losses}, {rows}": measure(options, losses, rows) for losses in LOSSES for rows in SIZES}
    together = {length: measure_together(options, length) for length in LENGTHS}
    print(format_table(results))
    print(", ".join(f"{ratio:.2f} (4 rows of {length})" for length, ratio in together.items()))
    if options.json:
        report = {
            "command": "python benchmarks/padding_free.py --forget tofu/forget10.json --retain tofu/retain90.json "
            f"--tokenizer MODEL --repeats {options.repeats} --seed {options.seed}",
            "machine": describe_machine("cpu"),
            "versions": describe_versions("torch", "transformers", "hf-unlearn"),
            "results": results,
            "together": together,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
