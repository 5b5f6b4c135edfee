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
The refusal margin: a small trained model made to begin its reply to harmful instructions with a refusal.

    HF_UNLEARN_TEST_DATA=DIR python benchmarks/intervention_refusal.py \
        --json benchmarks/results/intervention_refusal_cpu.json

`mlp.down_proj` of layer 2 of 5 is edited so that after each of some harmful instructions the first token of a refusal
is the most probable one by a margin, and after harmless ones it is not by the same margin. The 260k model writes
children's stories and has never followed an instruction: the numbers are about the mechanism, and say nothing about
the safety of a model that people talk to.

Measured, before and after: the share of instructions whose reply begins with a refusal, of those that were constrained
and of others; and the mean negative log-likelihood of stories that the model told before.
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any


# Before the libraries read them: nothing is fetched, and one core suffices
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import datasets  # noqa: E402
import torch  # noqa: E402
from compare_losses import BASE  # noqa: E402
from datasets import Dataset  # noqa: E402
from machine import describe_versions  # noqa: E402
from measuring import describe_machine  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hf_unlearn import InterventionConfig, InterventionTrainer  # noqa: E402
from hf_unlearn.constraints.linearize import last_logits  # noqa: E402
from hf_unlearn.forward import OutputHead  # noqa: E402
from hf_unlearn.intervention_data import prompt_ids, refusal_tokens  # noqa: E402


SEED, LAYER, EPSILON, ROUNDS = 42, "2", 1.0, 20
TRAINED, HELD_OUT, STORIES, STORY_TOKENS = 64, 256, 32, 128


def split(data: Path, trained: int = TRAINED, held_out: int = HELD_OUT) -> dict[str, Dataset]:
    """Instructions to constrain, and others; drawn by the seed, since the files are sorted by source."""
    rows = {}
    for name in ("harmful_train", "harmful_test", "harmless_test"):
        with open(data / "refusal" / f"{name}.json", encoding="utf-8") as file:
            instructions = [row["instruction"] for row in json.load(file)]
        rows[name] = random.Random(SEED).sample(instructions, len(instructions))
    sets = {
        "harmful": rows["harmful_train"][:trained],
        "harmless": rows["harmless_test"][:trained],
        "harmful_held_out": rows["harmful_test"][:held_out],
        "harmless_held_out": rows["harmless_test"][trained : trained + held_out],
    }
    return {name: Dataset.from_list([{"instruction": text} for text in texts]) for name, texts in sets.items()}


@torch.no_grad()
def tell_stories(model: PreTrainedModel) -> Tensor:
    """Sampled from the model, from its first token on."""
    torch.manual_seed(SEED)
    starts = torch.full((STORIES, 1), model.config.bos_token_id)
    return model.generate(
        starts, do_sample=True, max_new_tokens=STORY_TOKENS, min_new_tokens=STORY_TOKENS, pad_token_id=0
    )


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: dict[str, Dataset], stories: Tensor
) -> dict[str, Any]:
    """
    How often a reply begins with a refusal, by how much (nats, between the best token of a refusal and the best other
    one), and what the model makes of stories that it told before.
    """
    model.eval()
    tokens, head, results = refusal_tokens(tokenizer, None), OutputHead(model), {}
    for name, dataset in sets.items():
        margins = []
        for prompt in prompt_ids(dataset, tokenizer):
            logits = last_logits(model, head, [torch.tensor(prompt)])[0]
            others = logits.clone()
            others[tokens] = -torch.inf
            margins.append((logits[tokens].max() - others.max()).item())
        results[name] = {
            "rows": len(margins),
            "refused": sum(margin > 0 for margin in margins) / len(margins),
            "smallest_margin": min(margins),
            "median_margin": torch.tensor(margins).median().item(),
            "largest_margin": max(margins),
        }
    results["story_nll"] = model(stories, labels=stories).loss.item()
    return results


def refuse(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sets: dict[str, Dataset], **settings: Any
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
                aim="refuse",
                trainable_layers=LAYER,
                epsilon=EPSILON,
                rounds=ROUNDS,
                **settings,
            ),
            train_dataset=sets["harmful"],
            retain_dataset=sets["harmless"],
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
        "history": report.history,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Refusals of harmful instructions by one edit of a middle layer.")
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=os.environ.get("HF_UNLEARN_TEST_DATA"),
        help=f"folder with {BASE}/ and refusal/ (default: $HF_UNLEARN_TEST_DATA)",
    )
    parser.add_argument("--json", metavar="PATH", help="write all numbers here")
    options = parser.parse_args()
    if options.data is None:
        parser.error("--data is missing, and HF_UNLEARN_TEST_DATA is not set")
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    data = Path(options.data)
    tokenizer = AutoTokenizer.from_pretrained(data / BASE)
    model = AutoModelForCausalLM.from_pretrained(data / BASE, dtype=torch.float32).eval()
    sets, stories = split(data), tell_stories(model)
    before = measure(model, tokenizer, sets, stories)
    trainer, edit = refuse(model, tokenizer, sets)
    after = measure(trainer.model, tokenizer, sets, stories)
    print("| instructions | rows | refused | median margin, nats |")
    print("|---|---|---|---|")
    for name in sets:
        old, new = before[name], after[name]
        refused = f"{old['refused']:.3f} → {new['refused']:.3f}"
        print(f"| {name} | {new['rows']} | {refused} | {old['median_margin']:.2f} → {new['median_margin']:.2f} |")
    print(f"Stories, nats per token: {before['story_nll']:.4f} → {after['story_nll']:.4f}")
    print(f"{edit['constraints']} constraints, ||D||/||W|| = {edit['relative_norm']:.3f}, {edit['seconds']} s")
    if options.json:
        report = {
            "command": "python benchmarks/intervention_refusal.py",
            "machine": describe_machine("cpu"),
            "versions": describe_versions(
                "torch", "transformers", "accelerate", "datasets", "peft", "trl", "hf-unlearn"
            ),
            "base_model": BASE,
            "settings": {
                "seed": SEED,
                "layer": LAYER,
                "module": "mlp.down_proj",
                "epsilon": EPSILON,
                "rounds": ROUNDS,
                "retain_metric": trainer.args.retain_metric,
                "retain_damping": trainer.args.retain_damping,
            },
            "edit": edit,
            "before": before,
            "after": after,
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
