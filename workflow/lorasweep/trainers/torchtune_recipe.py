"""torchtune's recipe as this workflow runs it: the same training bit for bit, with a log, a validation loss, and an
early end where the loss is not finite.

The class is the wheel's own. Everything hangs on what it calls once a step: its metric logger.
"""

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchtune
from omegaconf import DictConfig
from torchtune import config as components
from torchtune import utils

from lorasweep.trainers import TrainingError
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
    """

    _metric_logger: Any
    _validation: Any

    def __init__(self, cfg: DictConfig, log: Path, loggers: Iterable[Any] = ()) -> None:
        super().__init__(cfg)
        self._log_every_n_steps = 1
        self._log_file = log
        self._loggers = list(loggers)
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
        self._log = TrainingLog(self._log_file)

    def train(self) -> None:
        self._start = time.perf_counter()
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
        metrics = self._log.add(row).get_metrics()
        for logger in self._loggers:
            logger.log_dict(metrics, step)

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


def run(cfg: DictConfig, log: Path, loggers: Iterable[Any] = ()) -> Recipe:
    """Run a recipe to its end, and return it.

    Raises:
        TrainingError: a loss is not finite.
    """
    recipe = Recipe(cfg, log, loggers)
    recipe.setup(cfg)
    try:
        recipe.train()
    finally:
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
        raise TrainingError(f"the training diverged: the {what} of step {step} is {loss}; a smaller lr may help")
    return loss
