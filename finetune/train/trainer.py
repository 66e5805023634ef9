"""TRL's trainer, fed with our own steps: a batch is all examples of a step, cut into passes. The only door to TRL."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

from finetune.data.examples import Example
from finetune.data.steps import steps_dataset
from finetune.errors import NumericsError, Problem, StorageError
from finetune.layout import cut_into_passes, lay_out_steps
from finetune.model.adapter import save_adapter
from finetune.plan import TrainPlan
from finetune.train.checkpoints import write_checkpoint
from finetune.train.loss import lay_end_to_end, stretch_losses_S
from finetune.train.state import Stateful, load_random_state, load_state, load_weights, save_state

OPTIMIZERS = {"adamw": "adamw_torch", "adamw-8bit": "adamw_bnb_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
FAILED_SAVES_ALLOWED = 2  # in a row; the next one ends the run


class StepTrainer(SFTTrainer):
    """SFTTrainer whose batch is one optimizer step: `examples`, the data; `plan`, how a step becomes passes."""

    def __init__(
        self, *, plan: TrainPlan, examples: Sequence[Example], held_out: Sequence[Example], **kwargs: Any
    ) -> None:
        self.plan = plan
        self.examples = examples
        self.held_out = held_out
        self.adapted_model = kwargs["model"]
        self.step_tokens = 0
        self.step_supervised = 0
        self.failed_saves = 0  # in a row, up to now
        super().__init__(**kwargs)

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of the step's loss: the mean over all supervised tokens of the step, however many passes it takes.

        `inputs` are the numbers of the step's examples.

        Raises:
            NumericsError: the loss of a pass is not finite; nothing was updated.
        """
        model.train()
        batch = [self.examples[index] for index in inputs]
        supervised = sum(example.supervised_tokens for example in batch)
        step_loss = torch.zeros((), device=self.args.device)
        for members in cut_into_passes([e.tokens for e in batch], tokens_per_pass=self.plan.tokens_per_pass):
            stretch = lay_end_to_end([batch[index] for index in members], device=self.args.device)
            with self.compute_loss_context_manager():
                loss = stretch_losses_S(model, stretch).sum() / supervised
            self._refuse_non_finite(loss, batch)
            self.accelerator.backward(loss)
            step_loss += loss.detach()
        self.step_tokens = sum(example.tokens for example in batch)
        self.step_supervised = supervised
        return step_loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss over all supervised tokens of the held-out examples."""
        with self.compute_loss_context_manager():
            loss = mean_loss(self.adapted_model, self.held_out, tokens_per_pass=self.plan.tokens_per_pass)
        metrics = {"eval_loss": loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """A sealed checkpoint; a disk that is full or fails is said, and only the third time in a row ends the run.

        Raises:
            NumericsError: a weight or a state is not finite.
            StorageError: the third save in a row failed.
        """
        folder, step = Path(str(self.args.output_dir)), self.state.global_step
        try:
            write_checkpoint(folder, step=step, keep=self.plan.keep_checkpoints, write=self._write_checkpoint_files)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            self.failed_saves += 1
            problem = Problem(str(folder), f"step {step} could not be saved ({error})")
            if self.failed_saves > FAILED_SAVES_ALLOWED:
                message = f"{problem.message}, as {self.failed_saves - 1} saves before it; make room and use --resume"
                raise StorageError(Problem(problem.where, message)) from error
            sys.stderr.write(f"{problem}; the run goes on, the next save tries again\n")
        else:
            self.failed_saves = 0

    def _write_checkpoint_files(self, folder: Path) -> None:
        assert self.optimizer is not None
        save_state(folder, model=self.adapted_model, optimizer=self.optimizer, parts=self._parts)
        save_adapter(self.adapted_model, folder)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(Path(resume_from_checkpoint), self.adapted_model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None
            load_state(Path(checkpoint), model=self.adapted_model, optimizer=self.optimizer, parts=self._parts)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: the scaler's state comes with the optimizer's."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint))

    @property
    def _parts(self) -> dict[str, Stateful]:
        """What else has a state; a scaler of the loss is there for float16 on a GPU only."""
        assert self.lr_scheduler is not None
        scaler = self.accelerator.scaler
        return {"schedule": self.lr_scheduler, **({"scaler": scaler} if scaler is not None else {})}

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the Trainer's count would want a padded batch; nothing reads it

    def _refuse_non_finite(self, loss: torch.Tensor, batch: Sequence[Example]) -> None:
        if not torch.isfinite(loss):
            rows = ", ".join(example.where for example in batch)
            message = f"the loss is {loss.item()}; nothing was updated. Rows of this step: {rows}"
            raise NumericsError(Problem(f"step {self.state.global_step + 1}", message))


def make_trainer(
    plan: TrainPlan,
    *,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    folder: Path,
) -> StepTrainer:
    """A trainer whose data is the plan's steps in order, so that resuming is skipping."""
    steps = lay_out_steps(plan.mixture, batch_size=plan.batch_size, steps=plan.steps, seed=plan.seed)
    trainer = StepTrainer(
        plan=plan,
        examples=examples,
        held_out=held_out,
        model=model,
        args=_arguments(plan, folder, has_eval=bool(held_out)),
        train_dataset=steps_dataset(steps),
        eval_dataset=steps_dataset([[0]]) if held_out else None,
        data_collator=_only_step,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # prints every log line to stdout, which is for answers
    return trainer


def mean_loss(model: torch.nn.Module, examples: Sequence[Example], *, tokens_per_pass: int) -> float:
    """Mean cross entropy in nats over all supervised tokens of the examples, without gradients."""
    return math.fsum(sum_losses(model, examples, tokens_per_pass=tokens_per_pass)) / sum(
        example.supervised_tokens for example in examples
    )


def sum_losses(model: torch.nn.Module, examples: Sequence[Example], *, tokens_per_pass: int) -> list[float]:
    """Per example the sum of its supervised tokens' cross entropies in nats, without gradients, in evaluation mode."""
    sums = [0.0] * len(examples)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        for members in cut_into_passes([e.tokens for e in examples], tokens_per_pass=tokens_per_pass):
            chosen = [examples[index] for index in members]
            losses = stretch_losses_S(model, lay_end_to_end(chosen, device=device))
            pieces = losses.split([example.supervised_tokens for example in chosen])
            for index, piece in zip(members, pieces, strict=True):
                sums[index] = piece.double().sum().item()
    model.train(was_training)
    return sums


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """The precision training computes in: bfloat16 or float16 products, or everything in float32."""
    return torch.autocast(device, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def _only_step(items: list[dict[str, Any]]) -> list[int]:
    return items[0]["step"]


def _arguments(plan: TrainPlan, folder: Path, *, has_eval: bool) -> SFTConfig:
    """Every library default that changes numbers, named; see facts of transformers/training_args.py."""
    return SFTConfig(
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
