"""transformers' Trainer over a fixed order of batches, in any number of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, slice_tensors
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.processes import num_processes, outcome_of_main, share_of
from teacher_cache.stages.training.batches import AlternatingBatches
from teacher_cache.stages.training.run_folder import (
    commit_checkpoint,
    explained_save,
    make_durable,
    remove_checkpoint,
    remove_old_checkpoints,
)


class OrderedTrainer(Trainer):
    """A Trainer over a fixed order of batches, whose checkpoints are committed.

    Several processes take their shares of each batch, so that their number changes nothing but
    the speed: a step's totals are those of whole batches, which every process reads.

    Args:
        batches: the order of all training batches, which to the Trainer is one epoch.
        **kwargs: transformers' Trainer arguments.
    """

    def __init__(self, *, batches: AlternatingBatches, **kwargs: Any):
        super().__init__(**kwargs)
        self._batches = batches
        self.remove_callback(PrinterCallback)
        # A process has one GPU: nn.DataParallel would average what are sums.
        self.args._n_gpu = min(1, self.args.n_gpu)
        # Every process has samples of its own, and draws its own dropout for them.
        if self.args.world_size > 1:
            set_seed(self.args.seed + self.args.process_index)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One pass over `batches`."""
        return self._loader(self.train_dataset, batch_sampler=self._batches)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """All held-out samples, in every process."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(dataset, batch_size=self.args.eval_batch_size)

    def _loader(self, dataset: Any, **order: Any) -> DataLoader[Any]:
        """Whole batches on the device: Accelerate would deal out other ones to each process."""
        loader = DataLoader(
            dataset,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            **order,
        )
        device = self.accelerator.device
        return prepare_data_loader(
            loader, device, num_processes=1, process_index=0, put_on_device=True
        )

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Samples of an optimizer step: a batch is that of all processes, not of each."""
        return super().get_total_train_batch_size(args) // args.world_size

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """This process's share of the next step's micro-batches, and the totals of all of it."""
        batches = list(islice(epoch_iterator, num_batches))
        share = partial(share_of, rank=self.args.process_index, num_processes=self.args.world_size)
        return [share(batch) for batch in batches], self.step_totals(batches)

    def step_totals(self, batches: list[dict[str, torch.Tensor]]) -> Any:
        """What `compute_loss` divides by: counted over an optimizer step's whole batches."""
        raise NotImplementedError  # each kind of training counts something else

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate in every process alike; what the main one finds is what all go by."""
        self.gather_function = self._of_this_process  # which Trainer takes back when it is done
        output = super().evaluation_loop(*args, **kwargs)
        (metrics,) = broadcast_object_list([output.metrics])
        return output._replace(metrics=metrics)

    def _of_this_process(self, values: Any) -> Any:
        """Accelerate's `gather_for_metrics` in one process: the last batch's loss comes padded."""
        state = self.accelerator.gradient_state
        is_short = state.end_of_dataloader and state.remainder > 0
        return slice_tensors(values, slice(0, state.remainder)) if is_short else values

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        # What a killed save of the same step left goes before any process writes to it.
        outcome_of_main(lambda: remove_checkpoint(checkpoint))
        with explained_save(checkpoint):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each has written its random state
        if not self.args.should_save:
            return
        make_durable(checkpoint)
        commit_checkpoint(checkpoint)
        best = self.state.best_model_checkpoint
        remove_old_checkpoints(folder, keep=Path(best) if best else None)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        # Of the steps since the last line, each process knows its own part.
        self._tr_loss = self.accelerator.reduce(self._tr_loss, reduction="mean")
        return super()._finalize_training(trial, num_train_samples, start_time)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and stop at a loss that is no number: nothing can be learned from there on.

        Raises:
            UserError: naming the step.
        """
        super().log(logs, start_time)
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.state.global_step}: start again with "
                "--resume never and a lower --lr, or with --dtype float32"
            )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weight decay on matrices alone: not on norms, biases and state-space parameters."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not name.endswith("A_log")  # Mamba-1's is a matrix
        ]

    def train_to_end(self, checkpoint: Path | None) -> dict[str, Any]:
        """Train, from a checkpoint on if there is one; what the record of the run keeps of it."""
        started = time.monotonic()
        output = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        best_step = self.state.best_global_step if self.args.load_best_model_at_end else None
        return {
            "num_steps": output.global_step,
            "num_processes": num_processes(),
            "seconds": round(time.monotonic() - started, 1),
            "evaluation": None if self.eval_dataset is None else self.final_evaluation(),
            "best_step": best_step,
            "log": self.state.log_history,
        }

    def final_evaluation(self) -> dict[str, float]:
        """Metrics of the model as training leaves it: the best one's, or those of the last step."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        step = best or self.state.global_step
        for entry in reversed(self.state.log_history):
            if entry["step"] == step and "eval_loss" in entry:
                return entry
        return self.evaluate()
