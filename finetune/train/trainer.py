"""TRL's trainer, fed with our own steps: a batch is all examples of a step, cut into passes. A door to TRL."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
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
from finetune.train.arguments import trainer_arguments
from finetune.train.checkpoints import write_checkpoint
from finetune.train.loss import lay_end_to_end, stretch_losses_S
from finetune.train.memory import is_out_of_memory
from finetune.train.optimizer import clip_gradients_, forget_gradients
from finetune.train.ranks import Ranks, deal
from finetune.train.state import Stateful, load_random_state, load_state, load_weights, random_state_bytes, save_state

FAILED_SAVES_ALLOWED = 2  # in a row; the next one ends the run
PASSES = "forward and backward"
ALONE = Ranks()


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
        self.settled_gib = 0.0  # held by this process after the step that last returned memory
        self.stage = PASSES  # what this process is doing, for an error that has to name it
        self.before_save: Callable[[], None] = lambda: None
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
        """The loss of the whole step, and its gradients on every rank, from this rank's share of the examples."""
        step_loss = torch.zeros((), device=self.args.device)
        for members in cut_into_passes([e.tokens for e in share], tokens_per_pass=self.plan.tokens_per_pass):
            chosen = [share[index] for index in members]
            stretch = lay_end_to_end(chosen, device=self.args.device, share_prefixes=self.shares_prefixes)
            with self.compute_loss_context_manager():
                loss = stretch_losses_S(model, stretch).sum() / self.step_supervised
            self.accelerator.backward(loss)
            step_loss += loss.detach()
        self.ranks.sum_gradients_(self._trainable)
        self.ranks.sum_(step_loss)
        return step_loss

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
            tokens_per_pass=self.plan.tokens_per_pass,
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
            write_checkpoint(folder, step=step, keep=self.plan.keep_checkpoints, write=write)
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


class EvaluationStopped(Exception):
    """A signal came between two passes of an evaluation."""


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


def mean_loss(  # noqa: PLR0913 - how a pass is laid out, by whom, and what ends it
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    tokens_per_pass: int,
    share_prefixes: bool = False,
    ranks: Ranks = ALONE,
    stopping: Callable[[], bool] = lambda: False,
) -> float:
    """Mean cross entropy in nats over all supervised tokens of the examples, without gradients; the ranks share them.

    Raises:
        EvaluationStopped: `stopping` answered True between two passes.
    """
    share = deal([example.tokens for example in examples], count=ranks.count)[ranks.rank]
    sums = sum_losses(
        model,
        [examples[index] for index in share],
        tokens_per_pass=tokens_per_pass,
        share_prefixes=share_prefixes,
        stopping=stopping,
    )
    total = torch.tensor([math.fsum(sums)], dtype=torch.float64)
    ranks.sum_(total)
    return total.item() / sum(example.supervised_tokens for example in examples)


def sum_losses(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    tokens_per_pass: int,
    share_prefixes: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Per example the sum of its supervised tokens' cross entropies in nats, without gradients, in evaluation mode."""
    sums = [0.0] * len(examples)
    device = next(model.parameters()).device
    with _evaluating(model):
        for members in cut_into_passes([e.tokens for e in examples], tokens_per_pass=tokens_per_pass):
            if stopping():
                raise EvaluationStopped
            chosen = [examples[index] for index in members]
            losses = stretch_losses_S(model, lay_end_to_end(chosen, device=device, share_prefixes=share_prefixes))
            pieces = losses.split([example.supervised_tokens for example in chosen])
            for index, piece in zip(members, pieces, strict=True):
                sums[index] = piece.double().sum().item()
    return sums


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without gradients and dropout, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def autocast(device: str, dtype: str) -> AbstractContextManager:
    """The precision training computes in: bfloat16 or float16 products, or everything in float32."""
    return torch.autocast(device, dtype=getattr(torch, dtype), enabled=dtype != "float32")


def _only_step(items: list[dict[str, Any]]) -> list[int]:
    return items[0]["step"]
