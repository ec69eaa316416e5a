"""Train with TRL's `SFTTrainer`, with a log, a validation loss, a stop at a loss that is not finite, and saved states.

The order of samples, the schedule and the optimizer are those of torchtune's recipes. So both trainers give the same
losses for the same initial adapter.
"""

import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from torch import distributed
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lorasweep.checkpoints.quantization import make_quantization
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorasweep.trainers import Stopped
from lorasweep.trainers.best_epoch import is_out_of_patience
from lorasweep.trainers.frame import Start, check_finite, prepare_folders
from lorasweep.trainers.mlflow_logger import MLflowLogger
from lorasweep.trainers.samples import Tokens, tokenize_samples
from lorasweep.trainers.saved_states import get_random_state, set_random_state
from lorasweep.trainers.tokenizer import ChatTokenizer
from lorasweep.trainers.training_log import Row, TrainingLog
from lorasweep.util.process import noticing_sigterm

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_IGNORED = -100
"""Label of a token that is not learnt."""

_STATE_FILES = ("adapter_*", "*.pt", "*.pth", "trainer_state.json")
"""The files of transformers' checkpoints that a training resumes from."""


def run(
    config: dict[str, Any],
    log: Path,
    folder: Path,
    metric_loggers: Collection[str],
    save_minutes: float,
    start: Start,
) -> int | None:
    """Run a recipe from its beginning or a saved state to its end; return the device's peak memory in bytes.

    `folder` is the training's. At SIGTERM, which SLURM sends before it ends a job, the state is saved after the current
    step.

    Raises:
        Diverged: a loss is not finite.
        Stopped: the training was told to stop.
    """
    disable_progress_bars()
    state, arguments = log.parent, config["trl"]
    tokenizer = ChatTokenizer(**config["tokenizer"])
    samples = tokenize_samples(tokenizer, **config["dataset"])
    order = _Order(
        len(samples),
        batch=arguments["per_device_train_batch_size"],
        accumulated=arguments["gradient_accumulation_steps"],
        processes=config.get("processes", 1),
        most_steps=config["max_steps_per_epoch"],
        halvings=start.halvings,
    )
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    if config["model"]["device"] == "cuda" and distributed.is_initialized():
        torch.cuda.set_device(distributed.get_rank())
    set_seed(arguments["seed"])
    model, mutated = _build_model(config)
    initial = state / "initial" if mutated else None
    if initial and is_first:
        _save_initial(model, initial)
    # What SFTTrainer asks of a tokenizer is its padding and that it can be saved.
    plain = tokenizer.tokenizer
    plain.pad_token = plain.convert_ids_to_tokens(tokenizer.pad_id)
    trainer = _Trainer(
        model=model,
        args=SFTConfig(output_dir=str(state / "checkpoints"), **arguments),
        train_dataset=Dataset.from_list([_label(sample) for sample in samples]),
        processing_class=plain,
        order=order,
        loraplus_lr_ratio=config.get("loraplus_lr_ratio"),
    )
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16 and "quantize" in config["model"]:
            parameter.data = parameter.data.float()  # TRL has them in bf16 on a quantized base
    if not is_first:
        set_seed(arguments["seed"] + distributed.get_rank())  # for dropout
    loggers = _make_loggers(metric_loggers, folder, state, config) if is_first else []
    validation = tokenize_samples(tokenizer, **config["dataset_val"]) if "dataset_val" in config else []
    reporter = _Reporter(
        trainer,
        TrainingLog(log, start.state["log"] if start.state else "") if is_first else None,
        loggers,
        start,
        save_minutes,
        validation=[_label(sample) for sample in validation],
        patience=config["best_epoch"]["patience"] if "best_epoch" in config else None,
        until=start.until,
        export=lambda epoch: _export(
            model,
            state / f"epoch_{epoch - 1}",
            _DTYPES[config["model"]["dtype"]],
            initial,
        ),
    )
    trainer.add_callback(reporter)

    def stop() -> None:
        reporter.must_stop = True

    try:
        with noticing_sigterm(stop):
            if not reporter.is_out_of_patience() and not reporter.has_paused:  # as of a state that was saved at the end
                trainer.train(resume_from_checkpoint=_unpack(start.state, state / "resumed") if start.state else None)
    finally:
        reporter.close()
    return reporter.peak_memory_bytes


class _Order(Sampler):  # type: ignore[misc]
    """The order of samples in each epoch: as torchtune's, a permutation by the epoch alone, of whole steps.

    Args:
        samples: number of samples.
        batch, accumulated, processes: samples per forward pass, passes per step, and processes.
        most_steps: number of steps after which an epoch ends; `None`: no limit.
        halvings: how many times `batch` was halved and `accumulated` doubled.
    """

    def __init__(
        self, samples: int, batch: int, accumulated: int, processes: int, most_steps: int | None, halvings: int
    ) -> None:
        self._samples, self._processes = samples, processes
        # With half the batch, the last half batch of an epoch could make a step that there was not before.
        batches = ceil(samples / processes) // (batch * 2**halvings)
        steps = batches // (accumulated // 2**halvings)
        self.steps = min(steps, most_steps or steps)
        self._length: int = self.steps * batch * accumulated * processes
        self.epoch = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self._samples, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        order += order[: -self._samples % self._processes]
        return iter(order[: self._length])


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the order of samples and LoRA+'s optimizer; it sums up the losses and tokens of a step."""

    def __init__(self, *, order: _Order, loraplus_lr_ratio: float | None, **arguments: Any) -> None:
        self.order, self._loraplus_lr_ratio = order, loraplus_lr_ratio
        super().__init__(**arguments)
        # So that the loss of a step is the mean over its tokens, in models too whose own loss could not be.
        self.model_accepts_loss_kwargs = True
        self.optimizer: Any
        self.step_loss: Any = 0.0
        self.step_tokens: Any = 0

    def get_train_dataloader(self) -> Any:
        size = self.args.per_device_train_batch_size
        loader = DataLoader(self.train_dataset, size, sampler=self.order, collate_fn=self.data_collator, drop_last=True)
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> Any:
        if self._loraplus_lr_ratio and self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            lr, decay = options.pop("lr"), self.args.weight_decay
            self.optimizer = create_loraplus_optimizer(
                self.model,
                kind,
                lr=lr,
                loraplus_lr_ratio=self._loraplus_lr_ratio,
                loraplus_weight_decay=decay,
                weight_decay=decay,
                **options,
            )
        return super().create_optimizer(model)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: a checkpoint is only for resuming."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.step_tokens = self.step_tokens + inputs["attention_mask"].sum()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss
        return loss


class _Reporter(TrainerCallback):  # type: ignore[misc]
    """Reports each step to the log and to the loggers, exports each epoch's adapter, and saves states.

    With several processes, they agree at each step on what to do next: if one acted alone, the others would wait.
    """

    def __init__(
        self,
        trainer: _Trainer,
        log: TrainingLog | None,
        loggers: Sequence["_Logger"],
        start: Start,
        save_minutes: float,
        validation: Sequence[Mapping[str, list[int]]],
        patience: int | None,
        until: int | None,
        export: Callable[[int], None],
    ) -> None:
        self._trainer, self._log, self._loggers, self._export = trainer, log, loggers, export
        self._saved, self._save_minutes, self._validation = start.saved, save_minutes, validation
        self._patience = patience
        self._steps = trainer.order.steps
        self._last = until and until * self._steps
        state = start.state or {}
        self.has_paused = bool(state) and state["step"] == self._last
        self._tokens, self._seconds_before = state.get("tokens", 0), state.get("seconds", 0.0)
        self.peak_memory_bytes: int | None = state.get("peak_memory_bytes")
        self.must_stop = False
        self._start = self._last_save = time.perf_counter()
        if state and log:
            for row in log.rows:
                self._tell(row)
            print(f"Resuming after step {state['step']}, saved by an earlier attempt.", flush=True)

    def is_out_of_patience(self) -> bool:
        """Whether the training ends before its last epoch. All processes ask at the same time."""
        own = self._log is not None and is_out_of_patience(self._log.rows, self._patience)
        [votes] = self._add_up([float(own)])
        return votes > 0

    def close(self) -> None:
        if self._log:
            self._log.close()
        for logger in self._loggers:
            logger.close()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = self._last_save = time.perf_counter()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.order.epoch = state.global_step // self._steps

    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self._lr = float(optimizer.param_groups[0]["lr"])  # before the schedule's next one

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        trainer, step = self._trainer, state.global_step
        is_due = time.perf_counter() - self._last_save >= 60 * self._save_minutes
        loss, tokens, due, stop = self._add_up(
            [float(trainer.step_loss), float(trainer.step_tokens), float(is_due), float(self.must_stop)]
        )
        trainer.step_loss, trainer.step_tokens = 0.0, 0
        loss /= args.world_size
        check_finite(loss, "loss", step)
        self._tokens += int(tokens)
        if args.device.type == "cuda":
            self.peak_memory_bytes = max(torch.cuda.max_memory_allocated(args.device), self.peak_memory_bytes or 0)
        is_last_of_epoch = step % self._steps == 0
        validation = (
            check_finite(self._validate(), "validation loss", step) if (is_last_of_epoch and self._validation) else None
        )
        epoch, seconds = (step - 1) // self._steps + 1, self._seconds_before + time.perf_counter() - self._start
        if self._log:
            self._tell(self._log.add(Row(step, epoch, loss, self._lr, self._tokens, seconds, validation)))
            if is_last_of_epoch:
                self._export(epoch)
        self.must_stop = stop > 0
        pauses = step == self._last
        control.should_training_stop |= pauses or (is_last_of_epoch and self.is_out_of_patience())
        control.should_save = due > 0 or stop > 0 or pauses
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Keep the checkpoint that transformers has written as a saved state."""
        control.should_save = False
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if distributed.is_initialized():
            distributed.barrier()  # each process writes its random state
        if self._log:
            last = self._log.rows[-1]
            values = {"tokens": last.tokens, "seconds": last.seconds, "peak_memory_bytes": self.peak_memory_bytes}
            content = {"step": state.global_step, "files": _pack(checkpoint), "log": self._log.text, **values}
            self._saved.save(state.global_step, content)
            shutil.rmtree(checkpoint)
        if distributed.is_initialized():
            distributed.barrier()  # else a process that exits early would have the first one terminated in its write
        self._last_save = time.perf_counter()
        if self.must_stop:
            step = state.global_step
            raise Stopped(f"told to stop (SIGTERM); step {step} is saved, and the next run resumes from it")
        return control

    def _tell(self, row: Row) -> None:
        for logger in self._loggers:
            logger.log(row.get_metrics(), row.step)

    def _add_up(self, values: Iterable[float]) -> list[float]:
        """Return the sums over all processes."""
        if not distributed.is_initialized():
            return list(values)
        # float64 represents any number of tokens exactly.
        sums = torch.tensor(list(values), dtype=torch.float64, device=self._trainer.args.device)
        distributed.all_reduce(sums)
        return list(sums.tolist())

    def _validate(self) -> float:
        """Return the mean loss per learnt token on the validation data. Leaves all random states untouched."""
        args, model = self._trainer.args, self._trainer.model
        size = args.per_device_train_batch_size
        total, count = 0.0, 0.0
        model.eval()
        with torch.no_grad():
            for start in range(args.process_index * size, len(self._validation), args.world_size * size):
                batch = self._trainer.data_collator(self._validation[start : start + size])
                batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
                labels = batch.pop("labels")[:, 1:].flatten()
                logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
                total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                count += float((labels != _IGNORED).sum())
        model.train()
        total, count = self._add_up([total, count])
        return total / count


class _Logger:
    """TensorBoard, W&B or MLflow, which get the log's values by the log's names."""

    def __init__(self, log: Callable[[dict[str, float], int], None], close: Callable[[], None]) -> None:
        self.log, self.close = log, close


def _make_loggers(names: Collection[str], folder: Path, aside: Path, config: Mapping[str, Any]) -> list[_Logger]:
    """Return the metric loggers with the given names, which write to the folders of `prepare_folders`."""
    folders = prepare_folders(names, folder, aside)
    loggers = []
    if "tensorboard" in folders:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folders["tensorboard"]))

        def add(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, global_step=step, new_style=True)

        loggers.append(_Logger(add, writer.close))
    if "wandb" in folders:
        import wandb

        written = str(folders["wandb"].resolve())
        run = wandb.init(project=folder.parents[1].name, name=folder.name, dir=written, config=dict(config))
        loggers.append(_Logger(lambda values, step: run.log({**values, "global_step": step}), run.finish))
    if "mlflow" in folders:
        mlflow = MLflowLogger(folder.parents[1].name, folder.name, config)
        loggers.append(_Logger(mlflow.log_dict, mlflow.close))
    return loggers


def _build_model(config: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return the base model with its new adapter, and whether the adapter's initial weights are parts of the base's."""
    section = config["model"]
    dtype, options = _DTYPES[section["dtype"]], {}
    if quantize := section.get("quantize"):
        options["quantization_config"] = make_quantization(quantize, section["dtype"])
        if section["device"] == "cuda":
            options["device_map"] = {"": torch.cuda.current_device()}
    base = AutoModelForCausalLM.from_pretrained(section["path"], dtype=dtype, local_files_only=True, **options)
    if "initial_adapter" in config:
        return PeftModel.from_pretrained(base, config["initial_adapter"]["path"], is_trainable=True), False
    settings = config["lora"]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    return model, str(settings["init_lora_weights"]).startswith(("pissa", "olora"))


def _save_initial(model: Any, folder: Path) -> None:
    """Save an initial adapter, by which the trained one is converted to an adapter of the unchanged base model."""
    settings = model.peft_config["default"]
    # PEFT's condition for the conversion: else it would change the base model again.
    name, settings.init_lora_weights = settings.init_lora_weights, True
    model.save_pretrained(folder, save_embedding_layers=False)
    settings.init_lora_weights = name


def _export(model: Any, folder: Path, dtype: torch.dtype, initial: Path | None) -> None:
    """Save the adapter in a precision, as one of the unchanged base model. Leaves all random states untouched."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    random = get_random_state()
    converted = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
    model.save_pretrained(aside, save_embedding_layers=False, **converted)
    set_random_state(random)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(aside / ADAPTER_WEIGHTS).items()}
    save_file(tensors, aside / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    for file in aside.iterdir():
        if file.name not in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            file.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _label(sample: Tokens) -> dict[str, list[int]]:
    tokens, is_learnt = sample
    return {"input_ids": tokens.tolist(), "labels": np.where(is_learnt, tokens, _IGNORED).tolist()}


def _pack(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the files of a checkpoint that a training resumes from, as bytes by name."""
    files = [file for pattern in _STATE_FILES for file in sorted(checkpoint.glob(pattern))]
    return {file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files}


def _unpack(state: Mapping[str, Any], folder: Path) -> str:
    """Write the files of a saved state, for this process alone, and return their folder."""
    folder = folder / str(distributed.get_rank() if distributed.is_initialized() else 0)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in state["files"].items():
        (folder / name).write_bytes(content.numpy().tobytes())
    return str(folder)
