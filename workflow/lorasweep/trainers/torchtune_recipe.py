"""torchtune's recipe as this workflow runs it: the same training bit for bit, with a log, a validation loss, an early
end where the loss is not finite, and states from which an interrupted training goes on.

The class is the wheel's own. Everything hangs on what it calls once a step: its metric logger.
"""

import importlib.util
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig
from torchtune import config as components
from torchtune import utils

from lorasweep.trainers import Diverged, Stopped
from lorasweep.trainers.torchtune_state import SavedStates, get_random_state, set_random_state
from lorasweep.trainers.training_log import Row, TrainingLog

RECIPE = "lora_finetune_single_device"


def _load_recipe_class() -> Any:
    """The wheel's `recipes` is no package that can be imported: its file is loaded."""
    file = Path(torchtune.__file__).parents[1] / "recipes" / f"{RECIPE}.py"
    spec = importlib.util.spec_from_file_location(f"lorasweep_{RECIPE}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice


class Recipe(_load_recipe_class()):  # type: ignore[misc]
    """The wheel's recipe, which reports each step to `log` and to metric loggers of torchtune's.

    Args:
        cfg: the recipe's configuration.
        log: where the log is written.
        loggers: are told what stands in the log.
        saved: where states are saved.
        state: one of them, after which the training goes on.
        save_minutes: between one state and the next.
        halvings: how often the batch size of `cfg` was halved, and the accumulation doubled.
    """

    _metric_logger: Any
    _validation: Any
    _dataloader: Any

    def __init__(
        self,
        cfg: DictConfig,
        log: Path,
        loggers: Iterable[Any],
        saved: SavedStates,
        state: Mapping[str, Any] | None,
        save_minutes: float,
        halvings: int = 0,
    ) -> None:
        super().__init__(cfg)
        self._log_every_n_steps = 1
        self._log_file = log
        self._loggers = list(loggers)
        self._saved, self._state, self._save_minutes = saved, state, save_minutes
        self._halvings = halvings
        self.must_stop = False
        self._tokens: Any = 0
        self._seconds_before = 0.0
        self.peak_memory_bytes: int | None = None

    def setup(self, cfg: DictConfig) -> None:
        super().setup(cfg)
        self._own_logger, self._metric_logger = self._metric_logger, self
        self._validation = (
            components.instantiate(cfg.dataset_val, self._tokenizer) if cfg.get("dataset_val") is not None else None
        )
        self._batch_size = cfg.batch_size
        self._is_packed = getattr(self._dataloader.dataset, "packed", hasattr(self._dataloader.dataset, "packs"))
        self._collate = components._utils._get_component_from_path(
            cfg.get("collate_fn", "torchtune.data.padded_collate_sft")
        )
        self._optimizer.register_step_pre_hook(self._before_step)
        self._log = TrainingLog(self._log_file, self._state["log"] if self._state else "")
        self._most: int | None = None
        if self._halvings:
            # Batches of the same samples as before: a half batch more would move those of all later steps.
            self._most = len(self._dataloader) // 2**self._halvings * 2**self._halvings
            self._dataloader = _Epochs(self._dataloader, self._most)
        if self._state:
            self._go_on(self._state)

    def train(self) -> None:
        self._start = self._last_save = time.perf_counter()
        super().train()

    def cleanup(self) -> None:
        self._log.close()
        for logger in (self._own_logger, *self._loggers):
            logger.close()

    def _loss_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self._tokens = self._tokens + self._count_tokens(batch)
        return super()._loss_step(batch)

    def _count_tokens(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Count the tokens of a batch [b, s] up to each row's padding, which is what nothing follows."""
        is_text = batch["labels"] != self._loss_fn.ignore_index
        if not self._is_packed:  # which pads with a token of its own
            is_text = is_text | (batch["tokens"] != self._tokenizer.pad_id)
        positions = torch.arange(1, is_text.shape[1] + 1, device=is_text.device)
        return (is_text * positions).amax(1).sum()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._lr = float(optimizer.param_groups[0]["lr"])
        if self._device.type == "cuda":  # before torchtune sets the peak back
            peak = torch.cuda.max_memory_allocated(self._device)
            self.peak_memory_bytes = max(peak, self.peak_memory_bytes or 0)

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        """Report a step; the recipe takes this object for its metric logger, and calls this after each update."""
        self._own_logger.log_dict(payload, step)
        loss = _check_finite(float(payload["loss"]), "loss", step)
        validation_loss = None
        if self._validation is not None and step % self._steps_per_epoch == 0:
            validation_loss = _check_finite(self._validate(), "validation loss", step)
        row = Row(
            step=step,
            epoch=(step - 1) // self._steps_per_epoch + 1,
            loss=loss,
            lr=self._lr,
            tokens=int(self._tokens),
            seconds=self._seconds_before + time.perf_counter() - self._start,
            validation_loss=validation_loss,
        )
        self._tell(self._log.add(row))
        # Gradients and sums of the step are spent: what is saved here is all that there is.
        if self.must_stop or self._is_due():
            self._save()
        if self.must_stop:
            raise Stopped(f"told to stop (SIGTERM); step {step} is saved, and the next run goes on from there")

    def _tell(self, row: Row) -> None:
        for logger in self._loggers:
            logger.log_dict(row.get_metrics(), row.step)

    def _is_due(self) -> bool:
        return time.perf_counter() - self._last_save >= 60 * self._save_minutes

    def _save(self) -> None:
        content = {
            "step": self.global_step,
            "adapter": {name: parameter.detach() for name, parameter in self.adapter_params.items()},
            "optimizer": self._optimizer.state_dict(),
            "lr_scheduler": self._lr_scheduler.state_dict(),
            "random": get_random_state(),
            "tokens": self._log.rows[-1].tokens,
            "seconds": self._log.rows[-1].seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "log": self._log.text,
        }
        self._saved.save(self.global_step, content)
        self._last_save = time.perf_counter()

    def _go_on(self, state: Mapping[str, Any]) -> None:
        """Be as after the step at which the state was saved."""
        with torch.no_grad():
            for name, parameter in self.adapter_params.items():
                parameter.copy_(state["adapter"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self._lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.global_step = state["step"]
        self.epochs_run, steps = divmod(self.global_step - 1, self._steps_per_epoch)
        accumulated = self._gradient_accumulation_steps
        # What torchtune breaks off at, counting from where an epoch begins; without it, the batches that there are.
        most = self.max_steps_per_epoch * accumulated if self.max_steps_per_epoch else self._most
        loader = getattr(self._dataloader, "loader", self._dataloader)
        begin = (steps + 1) * accumulated
        self._dataloader = _Epochs(loader, most, begin, lambda: set_random_state(state["random"]))
        self._tokens, self._seconds_before = state["tokens"], state["seconds"]
        self.peak_memory_bytes = state["peak_memory_bytes"]
        for row in self._log.rows:
            self._tell(row)
        print(f"Going on after step {self.global_step}, which an earlier attempt saved.", flush=True)

    def _validate(self) -> float:
        """Return the mean loss of an answer's token over the validation data; no random number is drawn for it."""
        total, count = 0.0, 0
        self._model.eval()
        with torch.no_grad():
            for start in range(0, len(self._validation), self._batch_size):
                end = min(start + self._batch_size, len(self._validation))
                batch = self._collate(
                    [self._validation[index] for index in range(start, end)],
                    padding_idx=self._tokenizer.pad_id,
                    ignore_idx=self._loss_fn.ignore_index,
                )
                utils.batch_to_device(batch, self._device)
                # The first token of a sample is not predicted.
                learnt = int((batch["labels"][:, 1:] != self._loss_fn.ignore_index).sum())
                total += float(super()._loss_step(batch)) * learnt
                count += learnt
        self._model.train()
        return total / count


class _Epochs:
    """A data loader of at most so many batches a pass, the first of which may begin later."""

    def __init__(
        self, loader: Any, most: int | None, begin: int = 0, on_begin: Callable[[], None] = lambda: None
    ) -> None:
        self.loader, self._most, self._begin, self._on_begin = loader, most, begin, on_begin

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        begin, self._begin = self._begin, 0
        if begin and begin != self._most:  # else the sampler would keep it for the next pass
            self.loader.sampler.load_state_dict({"yielded": begin * self.loader.batch_size})
        batches = iter(self.loader)
        if begin:
            self._on_begin()  # a pass begins with a draw of a random number
        yield from islice(batches, None if self._most is None else self._most - begin)


def run(
    cfg: DictConfig,
    log: Path,
    loggers: Iterable[Any],
    saved: SavedStates,
    state: Mapping[str, Any] | None,
    save_minutes: float,
    halvings: int = 0,
) -> Recipe:
    """Run a recipe to its end, from its beginning or from a saved state, and return it.

    At SIGTERM, which SLURM sends before it ends a job, the state is saved after the step that is being made.

    Raises:
        Diverged: a loss is not finite.
        Stopped: the training was told to stop.
    """
    recipe = Recipe(cfg, log, loggers, saved, state, save_minutes, halvings)
    recipe.setup(cfg)

    def stop(*_: Any) -> None:
        recipe.must_stop = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        recipe.train()
    finally:
        signal.signal(signal.SIGTERM, before)
        recipe.cleanup()
    return recipe


def make_loggers(names: Iterable[str], point: Path, aside: Path, settings: Mapping[str, Any]) -> list[Any]:
    """Return torchtune's loggers by name; of a point's folder `EXPERIMENT/POINT` they write to `EXPERIMENT/NAME/POINT`.

    What lies there already is removed. W&B is offline unless its own variables say otherwise, and has its caches in
    `aside`, and not in the home.
    """
    folders = {name: point.parent / name / point.name for name in ("tensorboard", "wandb")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    loggers: list[Any] = []
    if "tensorboard" in names:
        from torchtune.training.metric_logging import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(folders["tensorboard"]), organize_logs=False))
    if "wandb" in names:
        from torchtune.training.metric_logging import WandBLogger

        folder = folders["wandb"].resolve()
        folder.mkdir(parents=True)
        for name, value in _get_wandb_defaults(folder, aside.resolve() / "wandb").items():
            os.environ.setdefault(name, value)
        loggers.append(
            WandBLogger(project=point.parent.name, name=point.name, log_dir=str(folder), config=dict(settings))
        )
    return loggers


def _get_wandb_defaults(folder: Path, aside: Path) -> dict[str, str]:
    return {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_ERROR_REPORTING": "false",
        **{f"WANDB_{kind}_DIR": str(aside) for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT")},
    }


def _check_finite(loss: float, what: str, step: int) -> float:
    if not math.isfinite(loss):
        raise Diverged(f"the training diverged: the {what} of step {step} is {loss}; a smaller lr may help")
    return loss
