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
"""The attacks by name. Adding one is a function in a file beside this one, a line here, and a test."""

from . import (
    activation_noise,
    adapter_removal,
    benign_finetune,
    direction_ablation,
    few_shot,
    gcg,
    interpolation,
    latent_pgd,
    linear_probe,
    logit_lens,
    paraphrase,
    prefill,
    quantize,
    relearn,
    sampling_leak,
    soft_prompt,
    weight_noise,
)
from .run import AttackSpecification


ATTACKS = {
    "relearn": AttackSpecification(
        relearn.relearn,
        relearn.BUDGETS,
        "fine-tune on some forget rows, at several learning rates; ask for others",
        varies=("method", "learning_rate", "samples", "step"),
        axis="step",
    ),
    "benign_finetune": AttackSpecification(
        benign_finetune.benign_finetune,
        benign_finetune.BUDGETS,
        "fine-tune on rows to keep",
        varies=("method", "learning_rate", "samples", "step"),
        axis="step",
    ),
    "prefill": AttackSpecification(
        prefill.prefill,
        prefill.BUDGETS,
        "give the first tokens of the answer, or a prefix, and score the rest",
        varies=("answer_tokens", "prefix"),
        axis="answer_tokens",
    ),
    "paraphrase": AttackSpecification(
        paraphrase.paraphrase,
        paraphrase.BUDGETS,
        "ask in other words, frames and languages; the worst counts",
        varies=("template",),
    ),
    "few_shot": AttackSpecification(
        few_shot.few_shot,
        few_shot.BUDGETS,
        "show other forget rows in the prompt first",
        varies=("demonstrations", "draw"),
        axis="demonstrations",
    ),
    "sampling_leak": AttackSpecification(
        sampling_leak.sampling_leak,
        sampling_leak.BUDGETS,
        "sample many answers and count those that leak",
        needs_control=True,  # a share of samples, which no probability can be compared with
        varies=("samples",),
    ),
    "quantize": AttackSpecification(
        quantize.quantize, quantize.BUDGETS, "round the weights to INT8 and INT4", varies=("format",)
    ),
    "weight_noise": AttackSpecification(
        weight_noise.weight_noise,
        weight_noise.BUDGETS,
        "add noise to the weights",
        varies=("sigma", "draw"),
        axis="sigma",
    ),
    "activation_noise": AttackSpecification(
        activation_noise.activation_noise,
        activation_noise.BUDGETS,
        "add noise to one layer's residual stream",
        varies=("layer", "radius"),
        axis="radius",
    ),
    "latent_pgd": AttackSpecification(
        latent_pgd.latent_pgd,
        latent_pgd.BUDGETS,
        "the best small change of the residual stream towards the answer",
        needs_control=True,
        varies=("layer", "radius"),
        axis="radius",
    ),
    "soft_prompt": AttackSpecification(
        soft_prompt.soft_prompt,
        soft_prompt.BUDGETS,
        "learn free embeddings that elicit some forget rows; ask for others",
        needs_control=True,
        varies=("learning_rate", "steps", "num_embeddings"),
        axis="steps",
    ),
    "gcg": AttackSpecification(
        gcg.gcg, gcg.BUDGETS, "search for a suffix of tokens (needs nanogcg)", needs_control=True, varies=("suffix",)
    ),
    "direction_ablation": AttackSpecification(
        direction_ablation.direction_ablation,
        direction_ablation.BUDGETS,
        "take the direction in which hidden states moved out of all weights that write it",
        varies=("direction", "layer"),
    ),
    "logit_lens": AttackSpecification(
        logit_lens.logit_lens,
        logit_lens.BUDGETS,
        "decode each layer's residual stream",
        varies=("layer",),
        axis="layer",
    ),
    "linear_probe": AttackSpecification(
        linear_probe.linear_probe,
        linear_probe.BUDGETS,
        "train a probe on hidden states, against shuffled labels",
        needs_control=True,
        varies=("layer",),
        axis="layer",
        incomparable="a probe finds the topic of the rows, which a model that never saw them tells apart as well: "
        "read the scores beside each other",
    ),
    "adapter_removal": AttackSpecification(
        adapter_removal.adapter_removal, adapter_removal.BUDGETS, "drop the adapter"
    ),
    "interpolation": AttackSpecification(
        interpolation.interpolation,
        interpolation.BUDGETS,
        "mix the weights with those of the original",
        varies=("a",),
        axis="a",
        incomparable="the original is mixed into every model, so that the facts come back for one that never knew "
        "them too: read the curve",
    ),
}
