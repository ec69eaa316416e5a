"""Run torchtune's recipes with a log, a validation loss, a stop at a loss that is not finite, and saved states.

Trainings are bit for bit the same as torchtune's. The recipe classes come from torchtune's wheel and are subclassed.
The additions hook into what a recipe calls once per step: its metric logger or, with several processes, its profiler,
since only the first process has a metric logger.
"""

import importlib.util
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig, OmegaConf
from torch import distributed
from torch.distributed.tensor import distribute_tensor
from torchtune import config as components
from torchtune import training, utils
from torchtune.modules.peft import get_adapter_params

from lorasweep.trainers import Stopped
from lorasweep.trainers.best_epoch import is_out_of_patience
from lorasweep.trainers.frame import Start, check_finite, prepare_folders
from lorasweep.trainers.mlflow_logger import MLflowLogger
from lorasweep.trainers.saved_states import SavedStates, get_random_state, set_random_state
from lorasweep.trainers.training_log import Row, TrainingLog
from lorasweep.util.process import noticing_sigterm


def _load_recipe(name: str) -> Any:
    """Load a recipe's module from its file: the wheel's `recipes` folder is not an importable package."""
    file = Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"lorasweep_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_SingleDevice = _load_recipe("lora_finetune_single_device").LoRAFinetuneRecipeSingleDevice
_DISTRIBUTED = _load_recipe("lora_finetune_distributed")
_Distributed = _DISTRIBUTED.LoRAFinetuneRecipeDistributed
_Added: Any = object


class _EndsEarly(Exception):
    """Ends a training after an epoch that is not its last."""


class _Reporting(_Added):  # type: ignore[misc]
    """Mixin for torchtune's recipes: reports each step to the log and to torchtune's metric loggers, and saves states.

    Args:
        cfg: the recipe's configuration.
        log: file of the log.
        loggers: metric loggers, which get the log's values.
        saved: storage of the states.
        state: state to resume from; `None` starts from the beginning.
        save_minutes: minutes between two saved states.
        halvings: how many times the batch size of `cfg` was halved and its accumulation doubled.
        until: the epoch after which the training pauses; `None`: none.
    """

    _metric_logger: Any
    _validation: Any
    _dataloader: Any
    _is_rank_zero = True

    def __init__(
        self,
        cfg: DictConfig,
        log: Path,
        loggers: Iterable[Any],
        saved: SavedStates,
        state: Mapping[str, Any] | None,
        save_minutes: float,
        halvings: int = 0,
        until: int | None = None,
    ) -> None:
        super().__init__(cfg)
        self._log_every_n_steps = 1
        self._log_file = log
        self._loggers = list(loggers)
        self._saved, self._state, self._save_minutes = saved, state, save_minutes
        self._halvings, self._until = halvings, until
        self._patience: int | None = cfg.best_epoch.patience if "best_epoch" in cfg else None
        self.must_stop = False
        self._tokens: Any = 0
        self._seconds_before = 0.0
        self.peak_memory_bytes: int | None = None

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        if self._is_rank_zero:
            self._own_logger, self._metric_logger = self._metric_logger, self
            self._log = TrainingLog(self._log_file, self._state["log"] if self._state else "")
        self._validation = (
            components.instantiate(cfg.dataset_val, self._tokenizer) if cfg.get("dataset_val") is not None else None
        )
        self._batch_size = cfg.batch_size
        self._is_packed = getattr(self._dataloader.dataset, "packed", hasattr(self._dataloader.dataset, "packs"))
        self._collate = components._utils._get_component_from_path(
            cfg.get("collate_fn", "torchtune.data.padded_collate_sft")
        )
        self._optimizer.register_step_pre_hook(self._before_step)
        self._most: int | None = None
        if self._halvings:
            # Keep the samples of each step: an additional half batch would shift those of all later steps.
            self._most = len(self._dataloader) // 2**self._halvings * 2**self._halvings
            self._dataloader = _Epochs(self._dataloader, self._most)
        if self._state:
            self._go_on(self._state)

    def train(self) -> None:
        self._start = self._last_save = time.perf_counter()
        with suppress(_EndsEarly):
            super().train()

    def save_checkpoint(self, epoch: int) -> None:
        """Save the adapter of an epoch, and end the training if its patience is at an end, or if it is to pause."""
        super().save_checkpoint(epoch)
        if epoch + 1 == self._until or self._is_out_of_patience():
            raise _EndsEarly

    def _is_out_of_patience(self) -> bool:
        return is_out_of_patience(self._log.rows, self._patience)

    def cleanup(self) -> None:
        if self._is_rank_zero:
            self._log.close()
            for logger in (self._own_logger, *self._loggers):
                logger.close()

    def _count_tokens(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Count the tokens of a batch of shape [b, s], padding excluded."""
        is_text = batch["labels"] != self._loss_fn.ignore_index
        if not self._is_packed:  # packed samples are padded with another token
            is_text = is_text | (batch["tokens"] != self._tokenizer.pad_id)
        positions = torch.arange(1, is_text.shape[1] + 1, device=is_text.device)
        return (is_text * positions).amax(1).sum()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._lr = float(optimizer.param_groups[0]["lr"])
        if self._device.type == "cuda":  # before torchtune resets the peak
            peak = torch.cuda.max_memory_allocated(self._device)
            self.peak_memory_bytes = max(peak, self.peak_memory_bytes or 0)

    def _report(self, loss: float, tokens: int, is_due: bool, must_stop: bool) -> None:
        """Log the finished step, and save its state if `is_due` or `must_stop`."""
        step = self.global_step
        check_finite(loss, "loss", step)
        validation_loss = None
        if self._validation is not None and step % self._steps_per_epoch == 0:
            validation_loss = check_finite(self._validate(), "validation loss", step)
        row = Row(
            step=step,
            epoch=(step - 1) // self._steps_per_epoch + 1,
            loss=loss,
            lr=self._lr,
            tokens=tokens,
            seconds=self._seconds_before + time.perf_counter() - self._start,
            validation_loss=validation_loss,
        )
        if self._is_rank_zero:
            self._tell(self._log.add(row))
        # The gradients and sums of the step are used up here, so the state need not contain them.
        pauses = self._until is not None and step == self._until * self._steps_per_epoch
        if must_stop or is_due or pauses:
            self._save()
        if must_stop:
            raise Stopped(f"told to stop (SIGTERM); step {step} is saved, and the next run resumes from it")

    def _tell(self, row: Row) -> None:
        for logger in self._loggers:
            logger.log_dict(row.get_metrics(), row.step)

    def _is_due(self) -> bool:
        return time.perf_counter() - self._last_save >= 60 * self._save_minutes

    def _save(self) -> None:
        trained = self._gather_state()
        if self._is_rank_zero:
            content = {
                "step": self.global_step,
                **trained,
                "lr_scheduler": self._lr_scheduler.state_dict(),
                "tokens": self._log.rows[-1].tokens,
                "seconds": self._log.rows[-1].seconds,
                "peak_memory_bytes": self.peak_memory_bytes,
                "log": self._log.text,
            }
            self._saved.save(self.global_step, content)
        self._last_save = time.perf_counter()

    def _go_on(self, state: Mapping[str, Any]) -> None:
        """Restore the state after the step at which it was saved."""
        random = self._take_state(state)
        self._lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.global_step = state["step"]
        self.epochs_run, steps = divmod(self.global_step - 1, self._steps_per_epoch)
        accumulated = self._gradient_accumulation_steps
        limit = self.max_steps_per_epoch and self.max_steps_per_epoch * accumulated
        # Batches after which an epoch ends; `None`: all batches of the data loader.
        most = min((most for most in (limit, self._most) if most), default=None)
        loader = getattr(self._dataloader, "loader", self._dataloader)
        begin = (steps + 1) * accumulated
        self._dataloader = _Epochs(loader, most, begin, lambda: set_random_state(random))
        self._seconds_before = state["seconds"]
        self.peak_memory_bytes = state["peak_memory_bytes"]
        if self._is_rank_zero:
            self._tokens = state["tokens"]
            for row in self._log.rows:
                self._tell(row)
            print(f"Resuming after step {self.global_step}, saved by an earlier attempt.", flush=True)

    def _validate(self) -> float:
        """Return the mean loss per learnt token on the validation data. Leaves all random states untouched."""
        total, count = self._sum_validation(range(0, len(self._validation), self._batch_size))
        return total / count

    def _sum_validation(self, starts: Iterable[int]) -> tuple[float, int]:
        """Return the summed loss and the number of learnt tokens in the validation batches that begin at `starts`."""
        total, count = 0.0, 0
        self._model.eval()
        with torch.no_grad():
            for start in starts:
                end = min(start + self._batch_size, len(self._validation))
                batch = self._collate(
                    [self._validation[index] for index in range(start, end)],
                    padding_idx=self._tokenizer.pad_id,
                    ignore_idx=self._loss_fn.ignore_index,
                )
                utils.batch_to_device(batch, self._device)
                # The first token of a sample is never predicted.
                learnt = int((batch["labels"][:, 1:] != self._loss_fn.ignore_index).sum())
                total += float(_SingleDevice._loss_step(self, batch)) * learnt
                count += learnt
        self._model.train()
        return total, count


class Recipe(_Reporting, _SingleDevice):  # type: ignore[valid-type, misc]
    """torchtune's recipe for one device."""

    def _loss_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self._tokens = self._tokens + self._count_tokens(batch)
        return super()._loss_step(batch)

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        """Report a step. The recipe uses this object as its metric logger, and calls this after each update."""
        self._own_logger.log_dict(payload, step)
        self._report(float(payload["loss"]), int(self._tokens), self._is_due(), self.must_stop)

    def _gather_state(self) -> dict[str, Any]:
        return {
            "adapter": {name: parameter.detach() for name, parameter in self.adapter_params.items()},
            "optimizer": self._optimizer.state_dict(),
            "random": get_random_state(),
        }

    def _take_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Restore what `_gather_state` returned, and return the state of the random number generators."""
        with torch.no_grad():
            for name, parameter in self.adapter_params.items():
                parameter.copy_(state["adapter"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        return dict(state["random"])


class DistributedRecipe(_Reporting, _Distributed):  # type: ignore[valid-type, misc]
    """torchtune's recipe for several processes, each with one device and a shard of each tensor (FSDP).

    The processes agree at each step on what to do next: if one acted alone, the others would wait for it forever.
    """

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        self._profiler: Any = _Profiler(self._profiler, self._after_step)
        if not isinstance(self._dataloader, _Epochs):
            self._dataloader = _Epochs(self._dataloader, None)
        self._dataloader.on_batch = self._add_tokens
        self._loss = 0.0

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        """Store the loss of a step. The recipe calls this in the first process only."""
        self._own_logger.log_dict(payload, step)
        self._loss = float(payload["loss"])

    def _add_tokens(self, batch: Mapping[str, torch.Tensor]) -> None:
        self._tokens += int(self._count_tokens(batch))

    def _after_step(self) -> None:
        is_due = self._is_rank_zero and self._is_due()
        values = [self._loss, self._tokens, float(is_due), float(self.must_stop)]
        loss, tokens, due, stop = self._add_up(values)
        self._report(loss, int(tokens), due > 0, stop > 0)

    def _is_out_of_patience(self) -> bool:
        [votes] = self._add_up([float(self._is_rank_zero and super()._is_out_of_patience())])
        return votes > 0

    def _add_up(self, values: Iterable[float]) -> list[float]:
        """Return the sums over all processes."""
        # float64 represents any number of tokens exactly.
        sums = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        distributed.all_reduce(sums)
        return list(sums.tolist())

    def _save(self) -> None:
        super()._save()
        distributed.barrier()  # else a process that exits early would have the first one terminated while it writes

    def _gather_state(self) -> dict[str, Any]:
        """Return the unsharded tensors, in the first process, and the random states of all processes."""
        adapter = {name: p.detach().full_tensor().cpu() for name, p in get_adapter_params(self._model).items()}
        random: list[Any] = [None] * self.world_size
        distributed.all_gather_object(random, get_random_state())
        optimizer = training.get_full_optimizer_state_dict(
            self._model, self._optimizer, self._is_rank_zero, device=self._device
        )
        return {"adapter": adapter, "optimizer": optimizer, "random": random}

    def _take_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Restore this process's shards of what `_gather_state` returned, and return its random state."""
        with torch.no_grad():
            for name, parameter in get_adapter_params(self._model).items():
                whole = state["adapter"][name].to(self._device)
                parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements))
        training.load_from_full_optimizer_state_dict(
            self._model, self._optimizer, state["optimizer"], device=self._device
        )
        return dict(state["random"][self.rank])

    def _validate(self) -> float:
        """Return the mean loss per learnt token. All processes run equally many batches, since FSDP is collective."""
        size, samples = self._batch_size * self.world_size, len(self._validation)
        starts = range(0, samples, size)
        own = [start + self.rank * self._batch_size for start in starts]
        total, count = self._sum_validation(start for start in own if start < samples)
        if len(own) > sum(start < samples for start in own):
            self._sum_validation([0])
        total, tokens = self._add_up([total, count])
        return total / tokens


class _Profiler:
    """Wrapper of the recipe's profiler that calls `after_step` after each step."""

    def __init__(self, profiler: Any, after_step: Callable[[], None]) -> None:
        self._profiler, self._after_step = profiler, after_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._profiler, name)

    def step(self) -> None:
        self._profiler.step()
        self._after_step()


class _Epochs:
    """Wrapper of a data loader that limits each pass to `most` batches, and starts the first at batch `begin`."""

    def __init__(
        self, loader: Any, most: int | None, begin: int = 0, on_begin: Callable[[], None] = lambda: None
    ) -> None:
        self.loader, self._most, self._begin, self._on_begin = loader, most, begin, on_begin
        self.on_batch: Callable[[Any], None] = lambda batch: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        begin, self._begin = self._begin, 0
        # At the end of a pass no batch is drawn, so the sampler would apply the position to the next pass.
        if begin and begin != self._most:
            self.loader.sampler.load_state_dict({"yielded": begin * self.loader.batch_size})
        batches = iter(self.loader)
        if begin:
            self._on_begin()  # after `iter`, which draws a random number
        for batch in islice(batches, None if self._most is None else self._most - begin):
            self.on_batch(batch)
            yield batch


def run(
    cfg: DictConfig, log: Path, folder: Path, metric_loggers: Collection[str], save_minutes: float, start: Start
) -> int | None:
    """Run a recipe from its beginning or a saved state to its end; return the device's peak memory in bytes.

    `folder` is the training's. At SIGTERM, which SLURM sends before it ends a job, the state is saved
    after the current step.

    Raises:
        Diverged: a loss is not finite.
        Stopped: the training was told to stop.
    """
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    loggers = _make_loggers(metric_loggers, folder, log.parent, OmegaConf.to_container(cfg)) if is_first else []
    recipe_class = DistributedRecipe if distributed.is_initialized() else Recipe
    if distributed.is_initialized() and cfg.device == "cpu":
        _leave_out_gpus()
    recipe: Any = recipe_class(cfg, log, loggers, start.saved, start.state, save_minutes, start.halvings, start.until)
    recipe.setup(cfg)

    def stop() -> None:
        recipe.must_stop = True

    try:
        with noticing_sigterm(stop):
            recipe.train()
    finally:
        recipe.cleanup()
    peak: int | None = recipe.peak_memory_bytes
    return peak


def _leave_out_gpus() -> None:
    """Let torchtune's recipe for several processes run on a CPU, by disabling its calls for GPU memory."""
    replacements = {name: lambda *_, **__: None for name in ("cleanup_before_training", "log_memory_stats")}
    replacements["get_memory_stats"] = lambda *_, **__: None
    _DISTRIBUTED.training = SimpleNamespace(**{**vars(training), **replacements})


def _make_loggers(names: Collection[str], folder: Path, aside: Path, settings: Any) -> list[Any]:
    """Return the metric loggers with the given names, which write to the folders of `prepare_folders`."""
    folders = prepare_folders(names, folder, aside)
    loggers: list[Any] = []
    if "tensorboard" in folders:
        from torchtune.training.metric_logging import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(folders["tensorboard"]), organize_logs=False))
    if "wandb" in folders:
        from torchtune.training.metric_logging import WandBLogger

        project, written = folder.parents[1].name, str(folders["wandb"].resolve())
        loggers.append(WandBLogger(project=project, name=folder.name, log_dir=written, config=settings))
    if "mlflow" in folders:
        loggers.append(MLflowLogger(folder.parents[1].name, folder.name, settings))
    return loggers
