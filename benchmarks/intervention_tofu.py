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
Forty question/answer pairs of TOFU forgotten by one point-wise edit of a middle layer of a small trained model.

    HF_UNLEARN_TEST_DATA=DIR python benchmarks/intervention_tofu.py --work_dir WORK \
        --json benchmarks/results/intervention_tofu_cpu.json

The 260k model is taught 40 authors as `compare_losses.py` teaches it (a work folder of that benchmark is reused).
The first two authors, 20 pairs each, are forgotten: `mlp.down_proj` of layer 2 of 5 is edited so that no key word of a
true answer begins. Those are the words that its paraphrase has too, but neither the question nor a wrong answer, which
is a changed paraphrase. The retain metric sees the rows of 34 authors; four others are unseen.

Measured, before and after: the mean probability of the answers; the share of their tokens that are the greedy token
after the true ones before them; and the share of rows of which all are, where greedy decoding gives the whole answer.
Of the rows to forget, also of the tokens that begin a key word and of all tokens of key words; and all of it after
paraphrased questions.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any


# Before the libraries read them: nothing is fetched, and one core suffices
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import datasets  # noqa: E402
import torch  # noqa: E402
from compare_losses import BASE, ROWS_PER_AUTHOR, TEACHING, read_rows, teach  # noqa: E402
from datasets import Dataset  # noqa: E402
from machine import describe_versions  # noqa: E402
from measuring import describe_machine  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hf_unlearn import InterventionConfig, InterventionTrainer  # noqa: E402
from hf_unlearn.constraints.points import answer_points  # noqa: E402
from hf_unlearn.data import prepare_dataset  # noqa: E402


Row = dict[str, Any]

SEED, LAYER, EPSILON, ROUNDS = 42, "2", 0.5, 20
FORGET_AUTHORS, UNSEEN_AUTHORS = 2, 4
# Tokens of an answer: those that begin a key word, and all tokens of key words
KEYS = ("key_start", "key")


def split(data: Path) -> dict[str, list[Row]]:
    """Rows to forget, rows that the retain metric sees, and rows that it does not."""
    rows = read_rows(data)
    border, last = FORGET_AUTHORS * ROWS_PER_AUTHOR, UNSEEN_AUTHORS * ROWS_PER_AUTHOR
    others = rows["forget"][border:] + rows["retain"]
    return {"forget": rows["forget"][:border], "seen": others[:-last], "unseen": others[-last:]}


def pairs(rows: list[Row], question: str = "question") -> list[Row]:
    return [{"question": row[question], "answer": row["answer"]} for row in rows]


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    question: str = "question",
    has_keys: bool = False,
) -> dict[str, float]:
    """
    What a model knows of answers.

    Args:
        model ([`~transformers.PreTrainedModel`]): causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        rows (`list[dict]`): `answer` and the question.
        question (`str`, *optional*, defaults to `"question"`): the column of the question.
        has_keys (`bool`, *optional*, defaults to `False`): whether every row has key words, by its `perturbed_answer`.

    Returns:
        `dict[str, float]`: `probability` (mean of `P(answer)^(1 / tokens)`), `greedy_tokens` (share of answer tokens),
        `reproduced` (share of rows); with `has_keys` also `greedy_key_start` and `greedy_key`, and the numbers of
        those tokens.
    """
    args = InterventionConfig(tempfile.gettempdir(), use_cpu=True)
    prepared = list(prepare_dataset(Dataset.from_list(pairs(rows, question)), tokenizer, args, "measured"))
    probabilities, shares, reproduced = [], [], []
    greedy = {}  # context and token of each answer token -> whether it comes first
    for row in prepared:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        places = (labels != -100).nonzero()[:, 0]
        logits = model(ids[None]).logits[0, places - 1].double()
        log_probs = logits.log_softmax(-1)[torch.arange(len(places)), ids[places]]
        hits = (logits.argmax(-1) == ids[places]).tolist()
        probabilities.append(log_probs.mean().exp().item())
        shares += hits
        reproduced.append(all(hits))
        greedy |= {tuple(ids[: place + 1].tolist()): hit for place, hit in zip(places.tolist(), hits, strict=True)}
    measured = {
        "rows": len(rows),
        "probability": sum(probabilities) / len(rows),
        "greedy_tokens": sum(shares) / len(shares),
        "reproduced": sum(reproduced) / len(rows),
    }
    for positions in KEYS if has_keys else ():
        others = ([row[column] for row in rows] for column in ("perturbed_answer", "paraphrased_answer"))
        points = answer_points(prepared, tokenizer, positions, *others)
        hits = [greedy[(*context, *lower)] for context, lower in zip(points.contexts, points.lower, strict=True)]
        measured[f"{positions}_tokens"] = len(hits)
        measured[f"greedy_{positions}"] = sum(hits) / len(hits)
    return measured


def forget(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[Row]], **settings: Any
) -> tuple[InterventionTrainer, dict[str, Any]]:
    """Edits the model in place; the trainer, and how it went."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = InterventionTrainer(
            model,
            InterventionConfig(
                folder,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                seed=SEED,
                trainable_layers=LAYER,
                positions="key_start",
                epsilon=EPSILON,
                rounds=ROUNDS,
                **settings,
            ),
            train_dataset=Dataset.from_list(rows["forget"]),
            retain_dataset=Dataset.from_list(pairs(rows["seen"])),
            processing_class=tokenizer,
        )
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train()
    report = trainer.edit.report
    return trainer, {
        "constraints": report.constraints,
        "rounds": report.rounds,
        "norm": report.norm,
        "relative_norm": trainer.edit.certificates[0].values["relative_norm"],
        "rank": max(trainer.edit.ranks().values()),
        "history": report.history,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def measure_all(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: dict[str, list[Row]]
) -> dict[str, dict[str, float]]:
    """All sets, and the questions to forget in other words."""
    return {
        "forget": measure(model, tokenizer, rows["forget"], has_keys=True),
        "forget_paraphrased": measure(model, tokenizer, rows["forget"], "paraphrased_question", has_keys=True),
        "seen": measure(model, tokenizer, rows["seen"]),
        "unseen": measure(model, tokenizer, rows["unseen"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Forty pairs of TOFU forgotten by one edit of a middle layer.")
    parser.add_argument("--work_dir", metavar="DIR", required=True, help="the taught model goes there, or is there")
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=os.environ.get("HF_UNLEARN_TEST_DATA"),
        help=f"folder with {BASE}/ and tofu/ (default: $HF_UNLEARN_TEST_DATA)",
    )
    parser.add_argument("--json", metavar="PATH", help="write all numbers here")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data is missing, and HF_UNLEARN_TEST_DATA is not set")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    data, folder = Path(options.data), Path(options.work_dir) / "models" / "known"
    if not (folder / "teaching.json").is_file():  # which is written last
        known = read_rows(data)
        teach(str(data / BASE), known["forget"] + known["retain"], folder, "Teaching", 0)
    teaching = json.loads((folder / "teaching.json").read_text(encoding="utf-8"))
    if teaching["settings"] != TEACHING:
        raise RuntimeError("The work folder holds a model of other settings: name a new --work_dir.")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = split(data)
    before = measure_all(model, tokenizer, rows)
    trainer, edit = forget(model, tokenizer, rows)
    after = measure_all(trainer.model, tokenizer, rows)
    print("| set | probability | greedy tokens | whole answers | words begun | all tokens of those |")
    print("|---|---|---|---|---|---|")
    for name in before:
        cells = [
            f"{before[name][key]:.3f} → {after[name][key]:.3f}"
            for key in ("probability", "greedy_tokens", "reproduced", "greedy_key_start", "greedy_key")
            if key in before[name]
        ]
        cells += [""] * (5 - len(cells))
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"{edit['constraints']} constraints, ||D||/||W|| = {edit['relative_norm']:.3f}, {edit['seconds']} s")
    if options.json:
        report = {
            "command": "python benchmarks/intervention_tofu.py --work_dir DIR",
            "machine": describe_machine("cpu"),
            "versions": describe_versions(
                "torch", "transformers", "accelerate", "datasets", "peft", "trl", "hf-unlearn"
            ),
            "base_model": BASE,
            "teaching": teaching,
            "settings": {
                "seed": SEED,
                "layer": LAYER,
                "module": "mlp.down_proj",
                "positions": "key_start",
                "epsilon": EPSILON,
                "rounds": ROUNDS,
                "retain_metric": trainer.args.retain_metric,
                "retain_damping": trainer.args.retain_damping,
            },
            "edit": edit,
            "certificates": {c.name: {"values": c.values, "limits": c.limits} for c in trainer.edit.certificates},
            "before": before,
            "after": after,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
