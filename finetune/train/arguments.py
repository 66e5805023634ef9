"""A plan's training in the words of TRL: every number of it, also those that nobody sets."""

from __future__ import annotations

from pathlib import Path

from trl import SFTConfig  # type: ignore[attr-defined]

from finetune.plan import TrainPlan

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_bnb_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def trainer_arguments(plan: TrainPlan, folder: Path, *, has_eval: bool) -> SFTConfig:
    """Every library default that changes numbers, named; see facts of transformers/training_args.py."""
    arguments = SFTConfig(
        output_dir=str(folder),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        per_device_train_batch_size=1,  # one item of the dataset is one step
        gradient_accumulation_steps=1,
        max_length=None,
        packing=False,
        max_steps=plan.steps,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=SCHEDULES[plan.schedule],
        warmup_steps=plan.warmup_steps,
        optim=OPTIMIZERS[plan.optimizer],
        adam_beta1=plan.adam_betas[0],
        adam_beta2=plan.adam_betas[1],
        adam_epsilon=plan.adam_epsilon,
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        bf16=plan.dtype == "bfloat16",
        fp16=plan.dtype == "float16",
        use_cpu=plan.device == "cpu",
        gradient_checkpointing=plan.recompute,
        train_sampling_strategy="sequential",
        seed=plan.seed,
        data_seed=plan.seed,
        loss_type="nll",
        logging_steps=1,
        logging_nan_inf_filter=False,  # True logs a NaN loss as the average of the finite ones
        disable_tqdm=True,
        report_to=list(plan.log_to) or "none",
        save_strategy="steps",
        save_steps=plan.save_every_steps,
        save_total_limit=plan.keep_checkpoints,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=plan.evaluate_every_steps,
        dataloader_pin_memory=False,
    )
    # One process is one device: with two GPUs in sight the Trainer would copy the model and put two steps in a batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
