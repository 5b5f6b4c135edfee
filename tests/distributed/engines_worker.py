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
Trainings on one process, or on two CPU processes with one engine after another launch:

    torchrun --nproc_per_node 2 tests/distributed/engines_worker.py SPEC
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, load_dataset
from invariance_worker import save_probe
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.distributed import DistributedConfig

from hf_unlearn import UnlearnConfig, UnlearnTrainer


def full(tensor: torch.Tensor) -> torch.Tensor:
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def set_up(engine: str | None) -> dict:
    """Sets up an engine; returns what the training arguments need for it."""
    if engine is not None and engine.startswith("ZeRO"):
        zero = {"stage": int(engine[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        batches = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        return {"deepspeed": {"zero_optimization": zero, **dict.fromkeys(batches, "auto")}}
    if engine == "FSDP2":
        os.environ.update(
            ACCELERATE_USE_FSDP="true",
            FSDP_VERSION="2",
            FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
            FSDP_RESHARD_AFTER_FORWARD="true",
            FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
            FSDP_CPU_RAM_EFFICIENT_LOADING="false",
        )
    return {}


def make_trainer(
    settings: dict,
    data: Path,
    output_dir: str,
    engine: str | None,
    separate_reference: bool,
    lora: bool | dict,
    mixed_precision: bool,
    probe: bool,
    far_retain: bool,
    quantized: bool,
) -> UnlearnTrainer:
    folder = data / "tinystories-260k"
    is_loaded_sharded = engine == "FSDP2 at loading"

    def load() -> torch.nn.Module:
        config = DistributedConfig(fsdp_size=2, fsdp_mixed_precision=mixed_precision) if is_loaded_sharded else None
        options = {"distributed_config": config} if is_loaded_sharded else {}
        if quantized:
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)

    def rows(path: str, count: int):
        return load_dataset("json", data_files=str(data / path), split="train").select(range(count))

    args = UnlearnConfig(
        output_dir,
        **{
            "use_cpu": True,
            "max_steps": 3,
            "per_device_train_batch_size": 4 if engine is None else 2,
            "activation_checkpointing": False,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_length": 96,
            "disable_tqdm": True,
            **set_up(engine),
            **settings,
        },
    )
    if engine == "FSDP2":
        # accelerate shards on accelerators only: as it sees it, these processes have one each
        PartialState()._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    model = load()
    if probe:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if is_loaded_sharded else model
        args.probe_path = save_probe(whole, f"{output_dir}.probe-{os.environ.get('RANK', '0')}")
    forget, retain = rows("tofu/forget10.json", 12), rows("tofu/retain90.json", 7)
    if far_retain:  # so that a probe can tell the two apart
        forget = rows("tofu/forget10.json", 40)
        retain = Dataset.from_dict({"text": [f"{n} {n + 1} {n + 2} {n + 3} {n + 4} {n + 5}" for n in range(40)]})
        forget = Dataset.from_dict({"text": [f"{row['question']} {row['answer']}" for row in forget]})
    lora_options = {"target_modules": "all-linear", "r": 4, "lora_alpha": 0.03}
    return UnlearnTrainer(
        model,
        ref_model=load() if separate_reference else None,
        args=args,
        train_dataset=forget,
        retain_dataset=retain,
        eval_dataset=rows("tofu/forget10.json", 3) if args.eval_on_start else None,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **{**lora_options, **(lora if isinstance(lora, dict) else {})})
        if lora
        else None,
    )


def train(name: str, output: Path, engine: str | None, saves: bool, **options) -> None:
    folder = output / f"{name}.run"
    trainer = make_trainer(output_dir=str(folder), engine=engine, **options)
    if trainer.accelerator.num_processes != (1 if engine is None else 2):
        raise RuntimeError(f"wrong number of processes: {trainer.accelerator.num_processes}")
    start = {f"start/{n}": full(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    end = {f"end/{n}": full(p) for n, p in trainer.model.named_parameters() if p.requires_grad}
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if saves:
        evaluations.append(trainer.evaluate()["eval_loss"])
        trainer.save_model()
    footprint = trainer.record.footprint(trainer)
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.accelerator.is_main_process:
        numbers = None
        if footprint is not None:
            numbers = [footprint.relative_norm, footprint.max_abs, footprint.changed_parameters]
        record = {"log": losses, "footprint": numbers, "evaluations": evaluations}
        metadata = {key: json.dumps(value) for key, value in record.items()}
        save_file({**start, **end}, output / name, metadata=metadata)


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    engine, output = spec["engine"], Path(spec["output"])
    if engine == "FSDP2 at loading":
        torch.distributed.init_process_group("gloo")
    for run in spec["runs"]:
        try:
            train(**run, data=Path(spec["data"]), output=output, engine=engine)
        except ValueError as error:
            (output / f"{run['name']}.error").write_text(str(error))
    if engine is not None:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # at the interpreter's own exit, a thread of gloo's that is still alive now and then aborts it
