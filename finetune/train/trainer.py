"""TRL's trainer, fed with our own steps: a batch is all examples of a step, cut into passes. A door to TRL."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTTrainer  # type: ignore[attr-defined]

from finetune.data.examples import Example
from finetune.data.steps import steps_dataset
from finetune.errors import NumericsError, Problem, StorageError
from finetune.layout import cut_into_passes, lay_out_steps
from finetune.machine import settle_memory
from finetune.model.adapter import is_left_matrix, save_adapter
from finetune.plan import TrainPlan
from finetune.plan_layout import Lowered
from finetune.plan_lowered import layout_of_step, lighten
from finetune.train.arguments import trainer_arguments
from finetune.train.checkpoints import write_checkpoint
from finetune.train.held_out import EvaluationStopped, mean_loss
from finetune.train.loss import lay_end_to_end, stretch_losses_S
from finetune.train.memory import asked_for, is_out_of_memory
from finetune.train.optimizer import clip_gradients_, forget_gradients
from finetune.train.ranks import ALONE, Ranks, deal
from finetune.train.state import Stateful, load_random_state, load_state, load_weights, random_state_bytes, save_state
from finetune.train.step_again import free_memory, random_state, recompute_layers, set_random_state

FAILED_SAVES_ALLOWED = 2  # in a row; the next one ends the run
PASSES = "forward and backward"


class StepTrainer(SFTTrainer):
    """SFTTrainer whose batch is one optimizer step: `examples`, the data; `plan`, how a step becomes passes."""

    def __init__(
        self, *, plan: TrainPlan, examples: Sequence[Example], held_out: Sequence[Example], ranks: Ranks, **kwargs: Any
    ) -> None:
        self.plan = plan
        self.examples = examples
        self.held_out = held_out
        self.ranks = ranks
        self.adapted_model = kwargs["model"]
        self.step_tokens = 0
        self.step_supervised = 0
        self.failed_saves = 0  # in a row, up to now
        self.settled_gib = 0.0  # what settle_memory needs to hear of the step before
        self.recomputes = plan.recompute  # as the Trainer switches it on when it begins
        self.stage = PASSES  # what this process is doing, for an error that has to name it
        self.before_save: Callable[[], None] = lambda: None
        self.losses_kept: Callable[[], Mapping[int, float]] = dict  # held-out ones by step, whose best is kept
        self.lightened: Callable[[str], None] = lambda told: None  # called before a step goes on in another layout
        self.signalled: Callable[[], bool] = lambda: False
        super().__init__(**kwargs)
        # All of it: PEFT's wrapper says that it trains while the base inside is as it was loaded, without dropout and
        # recomputation.
        self.adapted_model.train()
        # Never DDP: it would wait for a gradient in every pass, and ranks may differ in their number of passes.
        prepare = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.prepare_model = prepare  # type: ignore[method-assign]
        # The Trainer's call after every step; a module's own would look for gradients at every frozen weight.
        self.adapted_model.zero_grad = partial(forget_gradients, self._trainable)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer; the B of a LoRA in groups of their own, with their own rate (LoRA+)."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.plan.learning_rate_ratio != 1:
            left = {id(p) for name, p in self.adapted_model.named_parameters() if is_left_matrix(name)}
            for group in list(optimizer.param_groups):
                faster = [p for p in group["params"] if id(p) in left]
                if not faster:
                    continue
                group["params"] = [p for p in group["params"] if id(p) not in left]
                rate = group["lr"] * self.plan.learning_rate_ratio
                optimizer.param_groups.append({**group, "params": faster, "lr": rate})
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """The steps in order, on every rank all of them: each takes its share of a step's examples."""
        return DataLoader(self.train_dataset, batch_size=1, shuffle=False, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of the step's loss: the mean over all supervised tokens of the step, however many passes it takes.

        `inputs` are the numbers of the step's examples.

        Raises:
            NumericsError: the loss is not finite; nothing was updated.
        """
        self.stage = PASSES
        if not model.training:  # it walks through every module
            model.train()
        batch = [self.examples[index] for index in inputs]
        tokens = [example.tokens for example in batch]
        share = [batch[index] for index in deal(tokens, count=self.ranks.count)[self.ranks.rank]]
        self.step_tokens = sum(tokens)
        self.step_supervised = sum(example.supervised_tokens for example in batch)
        step_loss = self._accumulate_gradients(model, share)
        self._refuse_non_finite(step_loss, batch)
        while self._overflowed():
            # float16: the same step again with a smaller scale, where the library would leave its rows out.
            forget_gradients(self._trainable)
            scaler = self.accelerator.scaler
            scaler.update(scaler.get_scale() / 2)
            step_loss = self._accumulate_gradients(model, share)
        self._batch = batch
        if self.args.device.type == "cpu":
            self.settled_gib = settle_memory(self.settled_gib)
        return step_loss

    def _accumulate_gradients(self, model: torch.nn.Module, share: Sequence[Example]) -> torch.Tensor:
        """The loss of the whole step, and its gradients on every rank, from this rank's share of the examples.

        Where a pass runs out of memory, on any rank, all take a lighter layout and begin the step again, with the
        random numbers that it began with.
        """
        began_with = random_state(self.args.device)
        while True:
            self._take_layout(model)
            loss, asked = self._run_passes(model, share)
            sums = torch.stack([loss, torch.full_like(loss, float(asked is not None))])
            self.ranks.sum_gradients_(self._trainable)
            self.ranks.sum_(sums)
            if not sums[1]:
                return sums[0]
            forget_gradients(self._trainable)
            set_random_state(self.args.device, began_with)
            self._lighten(asked or "another rank asked for it")

    def _run_passes(self, model: torch.nn.Module, share: Sequence[Example]) -> tuple[torch.Tensor, str | None]:
        """This rank's part of the step's loss, its gradients, and what was asked for if memory ran out on the way.

        Raises:
            RuntimeError, MemoryError: out of memory, and there is no lighter layout.
        """
        step_loss = torch.zeros((), device=self.args.device)
        try:
            for members in cut_into_passes([e.tokens for e in share], tokens_per_pass=self.layout.tokens_per_pass):
                chosen = [share[index] for index in members]
                stretch = lay_end_to_end(chosen, device=self.args.device, share_prefixes=self.shares_prefixes)
                with self.compute_loss_context_manager():
                    loss = stretch_losses_S(model, stretch).sum() / self.step_supervised
                self.accelerator.backward(loss)
                step_loss += loss.detach()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self._lighter_plan() is None:
                raise
            asked = asked_for(error)
        else:
            return step_loss, None
        forget_gradients(self._trainable)
        free_memory(self.args.device)  # only here, where no traceback holds the pass any more
        return torch.zeros_like(step_loss), asked

    def _take_layout(self, model: torch.nn.Module) -> None:
        if self.recomputes != self.layout.recompute:
            self.recomputes = self.layout.recompute
            recompute_layers(model, on=self.recomputes)

    @property
    def layout(self) -> Lowered:
        """How the passes of the step at work are laid out; of an evaluation, those of the step before it."""
        return layout_of_step(self.plan, self.state.global_step + (self.stage == PASSES))

    def _lighter_plan(self) -> TrainPlan | None:
        longest = max(example.tokens for example in self.examples)
        return lighten(self.plan, step=self.state.global_step + 1, longest=longest)

    def _lighten(self, asked: str) -> None:
        before, plan = self.layout, self._lighter_plan()
        assert plan is not None, "every rank has the same plan, and one of them saw a lighter one"
        self.plan = plan
        told = f"step {self.state.global_step + 1} ran out of memory, {asked}; from here on {self.layout.told(before)}"
        self.ranks.first_alone(lambda: self.lightened(told))

    def _overflowed(self) -> bool:
        """Whether a scaled gradient is out of float16's range, and the scale can still be halved."""
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < 2:
            return False
        return not all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in self._trainable)

    @cached_property
    def _trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.adapted_model.parameters() if parameter.requires_grad]

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """The norm before clipping.

        Raises:
            NumericsError: it is not finite; nothing was updated.
        """
        self.accelerator.unscale_gradients()
        norm = clip_gradients_(self._trainable, largest=self.plan.max_grad_norm)
        if not torch.isfinite(norm):
            self._refuse(f"the norm of the gradient is {norm.item()}", self._batch)
        self.stage = "optimizer"
        return norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss over all supervised tokens of the held-out examples; a signal breaks it off, and it is owed."""
        self.stage = "evaluation"
        metrics: dict[str, float] = {}
        with suppress(EvaluationStopped), self.compute_loss_context_manager():
            metrics = {"eval_loss": self._mean_loss_held_out()}
            self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def shares_prefixes(self) -> bool:
        """Whether what several examples of a pass begin with is computed once."""
        return "prefix" in self.plan.speedups

    def _mean_loss_held_out(self) -> float:
        alone = self.ranks.count == 1  # several would have to agree between passes
        return mean_loss(
            self.adapted_model,
            self.held_out,
            tokens_per_pass=self.layout.tokens_per_pass,
            share_prefixes=self.shares_prefixes,
            ranks=self.ranks,
            stopping=self.signalled if alone else lambda: False,
        )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """A sealed checkpoint; a disk that is full or fails is said, and only the third time in a row ends the run.

        Raises:
            NumericsError: a weight or a state is not finite.
            StorageError: the third save in a row failed.
        """
        self.stage = "saving a checkpoint"
        random_states = self.ranks.gather(random_state_bytes())
        self.ranks.first_alone(lambda: self._save_sealed(random_states))
        self.failed_saves = self.ranks.largest(self.failed_saves)

    def _save_sealed(self, random_states: Sequence[bytes]) -> None:
        folder, step = Path(str(self.args.output_dir)), self.state.global_step

        def write(staging: Path) -> None:
            self.before_save()
            self._write_checkpoint_files(staging, random_states)

        try:
            losses = self.losses_kept()
            write_checkpoint(folder, step=step, keep=self.plan.keep_checkpoints, write=write, losses=losses)
        except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
            if is_out_of_memory(error):
                raise
            self.failed_saves += 1
            problem = Problem(str(folder), f"step {step} could not be saved ({error})")
            if self.failed_saves > FAILED_SAVES_ALLOWED:
                message = f"{problem.message}, as {self.failed_saves - 1} saves before it; make room and use --resume"
                raise StorageError(Problem(problem.where, message)) from error
            sys.stderr.write(f"{problem}; the run goes on, the next save tries again\n")
        else:
            self.failed_saves = 0

    def _write_checkpoint_files(self, folder: Path, random_states: Sequence[bytes]) -> None:
        assert self.optimizer is not None
        save_state(
            folder,
            model=self.adapted_model,
            optimizer=self.optimizer,
            parts=self._parts,
            random_states=random_states,
        )
        save_adapter(self.adapted_model, folder)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(Path(resume_from_checkpoint), self.adapted_model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None
            load_state(Path(checkpoint), model=self.adapted_model, optimizer=self.optimizer, parts=self._parts)
            self._follow_schedule()

    def _follow_schedule(self) -> None:
        """The learning rate of the next step by the schedule of now; the saved one is that of a shorter run's."""
        schedule = self.lr_scheduler
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        assert self.optimizer is not None
        for group, rate, factor in zip(
            self.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * factor(schedule.last_epoch)
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]  # what metrics.jsonl shows

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: the scaler's state comes with the optimizer's."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not load_random_state(Path(checkpoint), rank=self.ranks.rank):
            self.seed_rank()

    def seed_rank(self) -> None:
        """Random numbers of its own for every rank, so that they do not all drop the same inputs."""
        if self.ranks.count > 1:
            torch.manual_seed(self.plan.seed + 1_000_003 * (self.ranks.rank + 1) + self.state.global_step)

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
            self._refuse(f"the loss is {loss.item()}", batch)

    def _refuse(self, what: str, batch: Sequence[Example]) -> None:
        """Stop before the update; every rank comes here, because loss and gradients are the same on all."""
        rows = ", ".join(example.where for example in batch)
        message = (
            f"{what}; nothing was updated, the last checkpoint is kept. Lower train.learning_rate, or look at the rows "
            f"of this step: {rows}"
        )
        error = NumericsError(Problem(f"step {self.state.global_step + 1}", message))
        self.ranks.agree(error if self.ranks.is_first else None)


def make_trainer(  # noqa: PLR0913 - everything a training is made of
    plan: TrainPlan,
    *,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    folder: Path,
    ranks: Ranks = ALONE,
) -> StepTrainer:
    """A trainer whose data is the plan's steps in order, so that resuming is skipping."""
    steps = lay_out_steps(plan.mixture, batch_size=plan.batch_size, steps=plan.steps, seed=plan.seed)
    trainer = StepTrainer(
        plan=plan,
        examples=examples,
        held_out=held_out,
        ranks=ranks,
        model=model,
        args=trainer_arguments(plan, folder, has_eval=bool(held_out)),
        train_dataset=steps_dataset(steps),
        eval_dataset=steps_dataset([[0]]) if held_out else None,
        data_collator=_only_step,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # prints every log line to stdout, which is for answers
    return trainer


def _only_step(items: list[dict[str, Any]]) -> list[int]:
    return items[0]["step"]
