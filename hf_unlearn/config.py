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
"""The configuration of a training run, on `TrainingArguments`."""

from dataclasses import dataclass, field

from transformers.utils import is_torch_bf16_gpu_available

from .base_config import SharedConfig
from .losses import FORGET_LOSSES, REFERENCE_READS, RETAIN_LOSSES
from .robustness.gradient_conflict import GRADIENT_CONFLICT
from .robustness.quantization import QUANTIZATION
from .robustness.sharpness import SHARPNESS


@dataclass
class UnlearnConfig(SharedConfig):
    r"""
    Configuration class for the [`UnlearnTrainer`].

    This class includes only the parameters that are specific to unlearning. For a full list of training arguments,
    please refer to the [`~transformers.TrainingArguments`] documentation. Names shared with TRL keep TRL's meaning.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used when the `model`
            argument of the [`UnlearnTrainer`] is provided as a string. `dtype` defaults to `float32` and
            `use_safetensors` to `True`.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model, so that policy and reference differ by their weights only.
        chat_template_path (`str`, *optional*):
            A tokenizer (local directory or Hub id) whose chat template is used, or a Jinja template file. Only the
            text of the template is taken; no token is added.

        > Parameters that control the scope: which weights may move

        trainable_layers (`str`, *optional*):
            0-based decoder layers that may move, such as `"5-7"` or `"0,2,5-7"`. Everything else is frozen. With an
            adapter, set `layers_to_transform` on the `peft_config` instead.
        trainable_modules (`list[str]`, *optional*):
            Modules that may move, by dotted name or its end, such as `mlp.down_proj`, within `trainable_layers`.

        > Parameters that control the data preprocessing

        dataset_text_field (`str`, *optional*, defaults to `"text"`):
            Name of the column that contains text.
        dataset_num_proc (`int`, *optional*):
            Number of processes to use for processing the data sets.
        max_length (`int` or `None`, *optional*, defaults to `1024`):
            Maximum length of a tokenized row. Longer rows lose their end; where the prompt alone fills the row, it
            loses its beginning instead, so that no row is left without its answer. If `None`, nothing is cut.
        split_long_texts (`bool`, *optional*, defaults to `False`):
            Whether to split plain text longer than `max_length` into several rows instead of cutting it.
        completion_only_loss (`bool`, *optional*):
            Whether to compute losses on the completion only. If `None` (default), that is so for data with prompt and
            completion, and the whole text counts for text.
        assistant_only_loss (`bool`, *optional*, defaults to `False`):
            Whether to compute losses on the assistant's turns of conversations only. Ignored for plain text.
        topic_column (`str`, *optional*):
            Column of the forget set (and, where it has it, of the retain set) that names a topic. Topics alternate
            from step to step, each with its own control vector and weights.
        topic_retain_weights (`dict[str, float]`, *optional*):
            Factor on the retain losses in the steps of a topic, e.g. `{"bio": 1200, "cyber": 600}`. 1 where unset.
        topic_steering_coefficients (`dict[str, float]`, *optional*):
            `steering_coefficient` of a topic, where it differs.

        > Parameters that control the losses

        forget_loss (`list[str]`, *optional*, defaults to `["npo"]`):
            What to forget: names from `hf_unlearn.FORGET_LOSSES` (`"ga"`, `"npo"`, `"simnpo"`, `"dpo"`, `"idk"`,
            `"wga"`, `"satimp"`, `"undial"`, `"ceu"`, `"pdu"`, `"rmu"`, `"adaptive_rmu"`, `"rsv"`,
            `"circuit_breaker"`), summed with `forget_loss_weights`.
        forget_loss_weights (`list[float]`, *optional*):
            Weight of each forget loss. 1 where unset.
        retain_loss (`list[str]`, *optional*, defaults to `["kl"]`):
            What to keep: names from `hf_unlearn.RETAIN_LOSSES` (`"nll"`, `"kl"`, `"logprob_mse"`, `"hidden_mse"`,
            `"circuit_breaker"`), summed with `retain_loss_weights`, or `"none"`.
        retain_loss_weights (`list[float]`, *optional*):
            Weight of each retain loss. 1 where unset.
        beta (`float`, *optional*):
            Inverse temperature of `"npo"`, `"dpo"` (published: 0.1) and `"simnpo"` (4.5), what `"undial"` takes off a
            logit (10), and the exponent of `"wga"` (1). Where unset, each loss has its published value.
        simnpo_delta (`float`, *optional*, defaults to `0.0`):
            Target of `"simnpo"` for the mean negative log-likelihood, in nats per token.
        saturation_exponent (`float`, *optional*, defaults to `5.0`):
            Exponent beta_1 of `"satimp"`, on the probability.
        importance_exponent (`float`, *optional*, defaults to `1.0`):
            Exponent beta_2 of `"satimp"`, on one minus the probability.
        pdu_initial_multiplier (`float`, *optional*, defaults to `1.0`):
            Multiplier of `"pdu"` on the retain losses at the start.
        pdu_retain_threshold (`float`, *optional*, defaults to `0.1`):
            What `"pdu"` keeps the retain losses below; with `nll`, nats per token.
        pdu_dual_step_size (`float`, *optional*, defaults to `1.0`):
            Step size of the multiplier of `"pdu"`, per optimizer step.
        pdu_warmup_epochs (`float`, *optional*, defaults to `5.0`):
            Epochs before the multiplier of `"pdu"` moves.
        refusals (`str`, *optional*):
            Text file with one refusal per line, from which `"dpo"` and `"idk"` draw the other answer to a forget
            prompt, where the data has no `chosen` one. Defaults to the list in `hf_unlearn.refusals`.
        hidden_layer (`int`, *optional*, defaults to `7`):
            0-based decoder layer whose output (residual stream) the hidden-state losses read. Ignored by the others.
        steering_coefficient (`float`, *optional*):
            Length of the control vector of `"rmu"` (published: 6.5) and `"rsv"` (10), which it is where unset.
        adaptive_scale (`float`, *optional*, defaults to `5.0`):
            Length of the control vector of `"adaptive_rmu"`, in mean norms of the topic's hidden states.
        circuit_breaker_layers (`str`, *optional*):
            0-based decoder layers whose outputs `"circuit_breaker"` reads, such as `"10,20"`, which is published for
            Llama-3-8B.

        > Parameters that control what makes forgetting hold; each composes with every loss and with each other

        reference_noise_std (`float`, *optional*, defaults to `0.0`):
            Standard deviation of the Gaussian noise on the reference's residual stream, retain rows only (random noise
            augmentation). Published for Zephyr-7B: 0.01 to 0.10.
        reference_noise_layer (`int`, *optional*):
            0-based decoder layer after which that noise is added. Defaults to `hidden_layer`.
        sharpness (`str`, *optional*, defaults to `"none"`):
            Where the forget gradient is taken, so that it leads to a flat place: at the weights as they are
            (`"none"`), after a step of `sharpness_radius` along itself (`"sam"`), as a mean over random weights around
            (`"randomized"`), or with a penalty on its norm (`"gradient_penalty"`) or on the curvature (`"curvature"`).
            The retain gradient is always that of the weights as they are.
        sharpness_radius (`float`, *optional*):
            Length of the step of `"sam"` (published: 0.01), `"gradient_penalty"` and `"curvature"` (0.01) over all
            trained weights, or the standard deviation of `"randomized"` (1e-4), which it is where unset.
        sharpness_weight (`float`, *optional*, defaults to `0.005`):
            Weight of the penalty of `"gradient_penalty"` and `"curvature"`. A gradient penalty with the weight of
            its radius is `"sam"`.
        sharpness_draws (`int`, *optional*, defaults to `3`):
            Random weights over which `"randomized"` takes the mean.
        weight_averaging_start (`int`, *optional*):
            Optimizer step from which on the trained weights are averaged; the mean is the model that training gives.
        weight_averaging_every (`int`, *optional*, defaults to `5`):
            Steps between two weights that enter the mean.
        gradient_conflict (`str`, *optional*, defaults to `"none"`):
            Takes off the forget gradient what lies along the retain gradient: nothing (`"none"`), over all trained
            weights (`"global"`), one tensor at a time (`"tensor"`), or over all and only where the two disagree
            (`"conflict"`).
        retain_null_space (`float`, *optional*):
            Share of the energy of the retain rows' activations, such as 0.99, in whose directions the trained
            matrices may not change.
        probe_weight (`float`, *optional*):
            Weight at the end of making the forget rows look harmless to a frozen probe. It follows
            `exp(-5 (1 - t)^2)`, t the share of the steps done. Published: 0.05 to 0.085.
        probe_weight_ratio (`float`, *optional*):
            The same relative to the gradients: the probe's gradient gets this many times the norm of the forget
            losses' one. Instead of `probe_weight`; costs one more pass.
        probe_path (`str`, *optional*):
            Probe from `hf-unlearn train-probe`. Where unset, one is trained on the forget and the retain set before
            the first step, and saved in `output_dir/probe`.
        probe_layers (`str`, *optional*):
            0-based decoder layers among which that probe chooses its own. All from the first trained one on where
            unset.
        probe_pooling (`str`, *optional*, defaults to `"mean"`):
            What that probe reads of a row: the `"mean"` over its positions, or the `"last"` one.
        probe_learning_rate (`float`, *optional*, defaults to `0.0001`):
            Learning rate of that probe.
        probe_epochs (`int`, *optional*, defaults to `10`):
            Epochs of that probe.
        latent_adversary_layers (`str`, *optional*):
            0-based decoder layers whose outputs an adversary changes on the forget rows, so as to raise the forget
            losses, such as `"8,16"`. None where unset.
        latent_adversary_radius (`float`, *optional*, defaults to `0.1`):
            How far it may move each position, in mean norms of the layer's output on the forget rows.
        latent_adversary_steps (`int`, *optional*, defaults to `16`):
            Steps of projected gradient ascent, each a forward and a backward of the forget rows.
        quantization_margin (`str`, *optional*, defaults to `"none"`):
            Takes the forget gradient at the trained matrices as `"int8"` or `"int4"` stores them (straight-through
            estimate), so that what is forgotten stays so after rounding; or as they are (`"none"`).

        > Parameters that control the reference model

        reference_mode (`str`, *optional*, defaults to `"auto"`):
            Where the frozen model comes from, for losses that read one. `"auto"`: the disabled adapter when a fresh
            `peft_config` leaves the base weights alone, else the initial values of the trained tensors, swapped in.
            `"swap"`: always the latter. `"copy"`: a second model.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether to compute what the losses read of the reference (log-probabilities, hidden states) once for each
            row, when it first comes, and to read it from disk from then on: in later epochs, after resuming, in other
            runs on the same model.
        reference_cache (`str`, *optional*):
            Folder of what `precompute_ref_log_probs` keeps. Defaults to `output_dir/reference_cache`.

        > Parameters that control precision, and how rows are run

        fp32_master_weights (`bool`, *optional*, defaults to `True`):
            Whether what is trained of a model loaded in bfloat16 is held in float32, with `bf16=True`; the frozen rest
            stays as it is. In bfloat16 most steps of unlearning are rounded away.

        padding_free (`bool`, *optional*, defaults to `False`):
            Whether to run the rows of a micro-batch one behind the other, without padding, as in TRL; forget and
            retain rows together where both run equally deep. Pays for short rows of unequal length, and with
            FlashAttention for all.

        > Parameters that control what is kept on disk

        prefix_cache (`str`, *optional*):
            Folder in which to keep, for each row, what the frozen layers below the first trained module give, so that
            later epochs and runs skip them. It takes one to some six hidden states per token.
        cache_size_gb (`float`, *optional*, defaults to `50.0`):
            What each of the two folders may hold, in 10^9 bytes. A run that would need more is refused.

        > Refused, with the replacement named

        packing (`bool`, *optional*, defaults to `False`):
            Not supported: forget and retain rows are paired one to one.
        loss_type (`str`, *optional*):
            Not supported: use `forget_loss` and `retain_loss`.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `bf16`: Defaults to `True` if `fp16` is not set and the GPU supports it, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`: a loss that is not finite ends the run.
    """

    _VALID_DICT_FIELDS = SharedConfig._VALID_DICT_FIELDS + [
        "topic_retain_weights",
        "topic_steering_coefficients",
    ]

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})
    logging_steps: float = field(
        default=10,
        metadata={
            "help": "Log every X updates steps. Should be an integer or a float in range `[0,1)`. If smaller than 1, "
            "will be interpreted as ratio of total training steps."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to use bfloat16 mixed precision. If not set, True if `fp16` is not set and the GPU "
            "supports it."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Whether to hide losses that are not finite from the log. They end the run either way."},
    )

    # Parameters that control the data preprocessing
    topic_column: str | None = field(
        default=None, metadata={"help": "Column that names a topic; topics alternate from step to step."}
    )
    topic_retain_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Factor on the retain losses per topic, as JSON: '{\"bio\": 1200}'."}
    )
    topic_steering_coefficients: dict[str, float] | str | None = field(
        default=None, metadata={"help": "`steering_coefficient` per topic, as JSON, where it differs."}
    )

    # Parameters that control the losses
    forget_loss: list[str] = field(
        default_factory=lambda: ["npo"],
        metadata={"help": "What to forget, summed with forget_loss_weights.", "choices": list(FORGET_LOSSES)},
    )
    forget_loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each forget loss. 1 where unset."}
    )
    retain_loss: list[str] = field(
        default_factory=lambda: ["kl"],
        metadata={"help": "What to keep, summed with retain_loss_weights.", "choices": [*RETAIN_LOSSES, "none"]},
    )
    retain_loss_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each retain loss. 1 where unset."}
    )
    beta: float | None = field(
        default=None,
        metadata={
            "help": "Inverse temperature of npo, dpo (0.1 where unset) and simnpo (4.5), what undial takes off a "
            "logit (10), exponent of wga (1)."
        },
    )
    simnpo_delta: float = field(
        default=0.0, metadata={"help": "Target of simnpo for the mean negative log-likelihood, nats per token."}
    )
    saturation_exponent: float = field(default=5.0, metadata={"help": "Exponent of satimp on the probability."})
    importance_exponent: float = field(
        default=1.0, metadata={"help": "Exponent of satimp on one minus the probability."}
    )
    pdu_initial_multiplier: float = field(
        default=1.0, metadata={"help": "Multiplier of pdu on the retain losses at the start."}
    )
    pdu_retain_threshold: float = field(
        default=0.1, metadata={"help": "What pdu keeps the retain losses below; with nll, nats per token."}
    )
    pdu_dual_step_size: float = field(
        default=1.0, metadata={"help": "Step size of the multiplier of pdu, per optimizer step."}
    )
    pdu_warmup_epochs: float = field(default=5.0, metadata={"help": "Epochs before the multiplier of pdu moves."})
    refusals: str | None = field(
        default=None,
        metadata={
            "help": "Text file with one refusal per line, for dpo and idk where the data has no `chosen` answers; "
            "the package ships a list."
        },
    )
    hidden_layer: int = field(
        default=7, metadata={"help": "0-based decoder layer whose output the hidden-state losses read."}
    )
    steering_coefficient: float | None = field(
        default=None, metadata={"help": "Length of the control vector of rmu (6.5 where unset) and rsv (10)."}
    )
    adaptive_scale: float = field(
        default=5.0,
        metadata={"help": "Length of the control vector of adaptive_rmu, in mean norms of the hidden states."},
    )

    circuit_breaker_layers: str | None = field(
        default=None, metadata={"help": "0-based decoder layers whose outputs circuit_breaker reads, such as '10,20'."}
    )

    # Parameters that control what makes forgetting hold
    reference_noise_std: float = field(
        default=0.0,
        metadata={"help": "Standard deviation of the noise on the reference's residual stream, retain rows only."},
    )
    reference_noise_layer: int | None = field(
        default=None, metadata={"help": "0-based decoder layer after which it is added. Default: hidden_layer."}
    )
    sharpness: str = field(
        default="none",
        metadata={
            "help": "Where the forget gradient is taken, so that it leads to a flat place.",
            "choices": list(SHARPNESS),
        },
    )
    sharpness_radius: float | None = field(
        default=None,
        metadata={"help": "Step of sam, gradient_penalty, curvature (0.01 where unset), or std of randomized (1e-4)."},
    )
    sharpness_weight: float = field(
        default=0.005, metadata={"help": "Weight of the penalty of gradient_penalty and curvature."}
    )
    sharpness_draws: int = field(default=3, metadata={"help": "Random weights over which randomized takes the mean."})
    weight_averaging_start: int | None = field(
        default=None, metadata={"help": "Optimizer step from which on the trained weights are averaged."}
    )
    weight_averaging_every: int = field(default=5, metadata={"help": "Steps between two weights that enter the mean."})
    gradient_conflict: str = field(
        default="none",
        metadata={
            "help": "Takes off the forget gradient what lies along the retain gradient.",
            "choices": list(GRADIENT_CONFLICT),
        },
    )
    retain_null_space: float | None = field(
        default=None,
        metadata={
            "help": "Share of the energy of the retain activations in whose directions the trained matrices may not "
            "change, such as 0.99."
        },
    )
    probe_weight: float | None = field(
        default=None, metadata={"help": "Weight at the end of making forget rows look harmless to a frozen probe."}
    )
    probe_weight_ratio: float | None = field(
        default=None,
        metadata={"help": "The same, as the ratio of the probe's gradient norm to that of the forget losses."},
    )
    probe_path: str | None = field(
        default=None,
        metadata={"help": "Probe from `hf-unlearn train-probe`. Where unset, one is trained before the first step."},
    )
    probe_layers: str | None = field(
        default=None,
        metadata={"help": "0-based decoder layers among which that probe chooses. All from the first trained on."},
    )
    probe_pooling: str = field(
        default="mean",
        metadata={"help": "What that probe reads of a row: all positions or the last.", "choices": ["mean", "last"]},
    )
    probe_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of that probe."})
    probe_epochs: int = field(default=10, metadata={"help": "Epochs of that probe."})
    latent_adversary_layers: str | None = field(
        default=None,
        metadata={"help": "0-based decoder layers whose outputs an adversary changes on the forget rows."},
    )
    latent_adversary_radius: float = field(
        default=0.1, metadata={"help": "How far it may move a position, in mean norms of the layer's output."}
    )
    latent_adversary_steps: int = field(default=16, metadata={"help": "Its steps of projected gradient ascent."})
    quantization_margin: str = field(
        default="none",
        metadata={
            "help": "Takes the forget gradient at the trained matrices as this format stores them.",
            "choices": list(QUANTIZATION),
        },
    )

    # Parameters that control the reference model
    reference_mode: str = field(
        default="auto",
        metadata={
            "help": "Where the frozen model comes from: the disabled adapter or the initial values swapped in "
            "('auto'), always the latter ('swap'), or a second model ('copy').",
            "choices": ["auto", "swap", "copy"],
        },
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={"help": "Compute what is read of the reference once for each row, and keep it on disk."},
    )
    reference_cache: str | None = field(
        default=None, metadata={"help": "Folder of what that keeps. Default: output_dir/reference_cache."}
    )

    # Parameters that control precision, and how rows are run
    fp32_master_weights: bool = field(
        default=True,
        metadata={"help": "Whether what is trained of a model in bfloat16 is held in float32, with bf16=True."},
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Whether to run the rows of a micro-batch in one sequence, without padding."},
    )

    # Parameters that control what is kept on disk
    prefix_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for what the frozen layers below the first trained module give for each row."},
    )
    cache_size_gb: float = field(
        default=50.0, metadata={"help": "What each of these folders may hold, in 10^9 bytes."}
    )

    # Refused, with the replacement named
    packing: bool = field(default=False, metadata={"help": "Not supported: forget and retain rows are paired."})
    loss_type: str | None = field(
        default=None, metadata={"help": "Not supported: use forget_loss and retain_loss instead."}
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
        self._validate()
        self._validate_what_holds()

    @property
    def uses_probe(self) -> bool:
        """Whether the forget losses have a probe beside them."""
        return self.probe_weight is not None or self.probe_weight_ratio is not None

    @property
    def splits_gradients(self) -> bool:
        """Whether the gradients of the forget and the retain losses are computed apart."""
        return (
            self.sharpness != "none"
            or self.gradient_conflict != "none"
            or self.quantization_margin != "none"
            or self.probe_weight_ratio is not None
        )

    def _validate_what_holds(self) -> None:
        for name in (
            "sharpness_radius",
            "sharpness_weight",
            "probe_weight",
            "probe_weight_ratio",
            "probe_learning_rate",
            "latent_adversary_radius",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive.")
        for name in ("sharpness_draws", "weight_averaging_every", "probe_epochs", "latent_adversary_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.reference_noise_std < 0:
            raise ValueError(f"reference_noise_std={self.reference_noise_std} must not be negative.")
        if self.reference_noise_std > 0:
            if not any(REFERENCE_READS & RETAIN_LOSSES[name].all_reads for name in self.retain_loss if name != "none"):
                raise ValueError(
                    "reference_noise_std adds noise to the reference model on the retain rows, and no retain loss "
                    f"({', '.join(self.retain_loss)}) reads one: choose kl, logprob_mse or hidden_mse, or remove it."
                )
        elif self.reference_noise_layer is not None:
            raise ValueError("reference_noise_layer needs reference_noise_std, the strength of the noise.")
        if self.retain_loss == ["none"]:
            if self.gradient_conflict != "none":
                raise ValueError(
                    f"gradient_conflict={self.gradient_conflict!r} compares with the retain gradient, and retain_loss "
                    "is none: choose one, such as nll."
                )
            if self.retain_null_space is not None:
                raise ValueError("retain_null_space reads the retain rows, and retain_loss is none: choose one.")
        if self.retain_null_space is not None and not 0 < self.retain_null_space <= 1:
            raise ValueError(f"retain_null_space={self.retain_null_space} is a share of energy: above 0, at most 1.")
        if self.probe_weight is not None and self.probe_weight_ratio is not None:
            raise ValueError("probe_weight and probe_weight_ratio are two ways to weigh the probe: give one of them.")
        if self.probe_path is not None and not self.uses_probe:
            raise ValueError("probe_path has no effect without probe_weight or probe_weight_ratio: give one of them.")
        if self.uses_probe and self.probe_path is None and self.retain_loss == ["none"]:
            raise ValueError(
                "The probe is trained to tell the forget rows from the retain rows, and retain_loss is none: give a "
                "probe_path (`hf-unlearn train-probe`), or choose a retain loss."
            )
        if "circuit_breaker" in self.forget_loss + self.retain_loss and self.circuit_breaker_layers is None:
            raise ValueError(
                "circuit_breaker reads the layers circuit_breaker_layers, which is unset: a third and two thirds of "
                'the depth are usual ("10,20" of 32).'
            )
        if self.weight_averaging_start is not None and self.weight_averaging_start < 1:
            raise ValueError(f"weight_averaging_start={self.weight_averaging_start} must be at least 1.")

    def _validate(self) -> None:
        if self.packing:
            raise ValueError(
                "packing=True is not supported: forget and retain rows are paired one to one. Remove it; long plain "
                "text can be split with split_long_texts=True."
            )
        if self.loss_type is not None:
            raise ValueError(
                "loss_type is not supported: use forget_loss (what to forget: "
                f"{', '.join(FORGET_LOSSES)}) and retain_loss (what to keep: {', '.join(RETAIN_LOSSES)}, none)."
            )
        if self.padding_free and self.prefix_cache is not None:
            raise ValueError(
                "padding_free=True runs rows of all lengths in one sequence, and prefix_cache keeps what padded rows "
                "give: remove one of the two."
            )
        if self.reference_cache is not None and not self.precompute_ref_log_probs:
            raise ValueError("reference_cache is the folder of precompute_ref_log_probs=True: set that, or remove it.")
        if not self.cache_size_gb > 0:
            raise ValueError(f"cache_size_gb={self.cache_size_gb} must be positive.")
        if not self.forget_loss:
            raise ValueError(f"forget_loss is empty: choose from {', '.join(FORGET_LOSSES)}.")
        if not self.retain_loss:
            raise ValueError('retain_loss is empty: write "none" to keep nothing on purpose.')
        if "none" in self.retain_loss and len(self.retain_loss) > 1:
            raise ValueError('retain_loss: "none" stands alone.')
        for losses, weights in (("forget_loss", "forget_loss_weights"), ("retain_loss", "retain_loss_weights")):
            names, values = getattr(self, losses), getattr(self, weights)
            if len(set(names)) < len(names):
                raise ValueError(f"{losses} names a loss twice ({', '.join(names)}): give it a weight instead.")
            if values is not None and len(values) != len(names):
                raise ValueError(
                    f"{weights} has {len(values)} value{'s' if len(values) != 1 else ''} but {losses} has "
                    f"{len(names)}: give one weight per loss."
                )
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be positive.")
        if not self.adaptive_scale > 0:
            raise ValueError(f"adaptive_scale={self.adaptive_scale} must be positive.")
        for name in (
            "saturation_exponent",
            "importance_exponent",
            "pdu_initial_multiplier",
            "pdu_dual_step_size",
            "pdu_warmup_epochs",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if "pdu" in self.forget_loss and self.retain_loss == ["none"]:
            raise ValueError(
                "forget_loss pdu bounds the retain losses, and retain_loss is none: choose one, such as nll."
            )
        if self.hidden_layer < 0:
            raise ValueError(f"hidden_layer={self.hidden_layer} must be a 0-based layer.")
        if self.label_smoothing_factor != 0:
            raise ValueError("label_smoothing_factor is not supported: no unlearning loss reads it. Remove it.")
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                "neftune_noise_alpha is not supported: it would add noise to the reference too. Remove it."
            )
        if self.torch_compile:
            raise ValueError("torch_compile is not supported yet: losses run truncated forwards. Remove it.")
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} is not supported: rows are paired; use "
                "'random' or 'sequential'."
            )
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "activation_checkpointing_kwargs={'use_reentrant': True} is not supported: with several forwards in a "
                "step its gradients are silently wrong. Remove it, or set it to False."
            )
        if (self.activation_checkpointing_kwargs or {}).get("offload") and self.device.type == "cpu":
            raise ValueError(
                "activation_checkpointing_kwargs={'offload': True} moves activations to main memory, where a CPU has "
                "them: remove it."
            )
        if (self.topic_retain_weights or self.topic_steering_coefficients) and self.topic_column is None:
            raise ValueError("topic_retain_weights and topic_steering_coefficients need topic_column.")
