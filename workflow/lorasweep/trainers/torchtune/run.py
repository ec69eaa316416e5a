"""Running a recipe of torchtune's: `lora_finetune_single_device`, or `lora_finetune_distributed` on several GPUs.

Adapters alone are trained and saved, whatever the mode: torchtune's own full export adds the update into the live
weights, which on a CPU corrupts the model from the second epoch on.
"""

import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD, TRAINING_LOG
from lorasweep.trainers import SAVE_MINUTES, Diverged, TrainingError
from lorasweep.trainers.publication import check_weights, complete, publish
from lorasweep.trainers.torchtune.memory import (
    MEMORY_NOTE,
    OUT_OF_MEMORY,
    halve_batch,
    mark_attempt,
    plan_halving,
    read_halvings,
)
from lorasweep.trainers.torchtune.recipe import PROCESSES
from lorasweep.util.digest import digest_file
from lorasweep.util.files import explain_write_failure, hold_alone, write_aside
from lorasweep.util.versions import get_versions

STAGE = "train"


_PACKAGES = ("torch", "torchtune", "torchao", "transformers", "datasets")
"""Those that the numbers of a training depend on."""

_DIVERGENCE_NOTE = "train.diverged.json"


def measure_lengths(recipe: Path, most: int) -> list[int]:
    """Return how many tokens samples have, of so many at most, evenly taken; none is cut or packed."""
    from datasets.utils import disable_progress_bars
    from torchtune import config as components

    disable_progress_bars()
    config = OmegaConf.load(recipe)
    config.tokenizer.max_seq_len = None
    config.dataset.packed = False
    with tempfile.TemporaryDirectory() as cache:  # and not in the home
        dataset = components.instantiate(config.dataset, components.instantiate(config.tokenizer), cache_dir=cache)
        step = max(1, -(-len(dataset) // most))
        return [len(dataset[index]["tokens"]) for index in range(0, len(dataset), step)]


def train(
    recipe: Path,
    adapter: Path,
    metric_loggers: Collection[str] = (),
    save_minutes: float = SAVE_MINUTES,
    earlier: Mapping[int, Path] | None = None,
) -> None:
    """Run a recipe, and publish the adapter of its last epoch, and those of `earlier` ones, each in its directory.

    `adapter/` appears whole or not at all: the weights as safetensors, PEFT's configuration, the base model's
    tokenizer, the log of the training, and a record of what was trained on what. It has no
    `config.json`, with which transformers would take it for a full model.

    What was trained stays in the point's state too, until the point is cleaned up: a training that ended after the run
    that wanted it had died is not done again. One that was interrupted goes on from the last state that it saved, and
    ends bit for bit as if it had not been; a state of another recipe, base model or version is dropped.

    Raises:
        Diverged: a loss or a value of the update is not finite, now or when this very training was done before.
        Stopped: it was told to stop, and its state is saved.
        TrainingError: torchtune failed, the update is zero, or there is no such epoch.
    """
    config = OmegaConf.load(recipe)
    targets = {**(earlier or {}), config.epochs: adapter}
    if max(targets) > config.epochs:
        raise TrainingError(f"{recipe}: is of {config.epochs} epochs, and that of epoch {max(targets)} is wanted")
    state = Path(config.output_dir)
    trained = state.with_name("trained")
    with hold_alone(state.with_name("train.lock"), f"training {adapter.parent.name}"):
        if all(_is_trained(trained / str(epoch), recipe) for epoch in targets):
            print(f"This recipe was trained by an earlier run, which did not see its end: {trained} is taken.")
        else:
            shutil.rmtree(trained, ignore_errors=True)
            facts = {"data_sha256": _check_digest(recipe, Path(config.dataset.data_files))}
            with _note_divergence(recipe, config), mark_attempt(recipe, config):
                facts |= _run(recipe, config, adapter.parent, metric_loggers, save_minutes)
                _collect(recipe, config, state / "trained", targets, facts).rename(trained)
            shutil.rmtree(state)
            for note in (MEMORY_NOTE, _DIVERGENCE_NOTE):
                state.with_name(note).unlink(missing_ok=True)
        for epoch, target in targets.items():
            publish(trained / str(epoch), target)


@contextmanager
def _note_divergence(recipe: Path, config: Any) -> Iterator[None]:
    """Do not do again what diverged: with the same recipe, model and versions it would come to the same."""
    note = Path(config.output_dir).with_name(_DIVERGENCE_NOTE)
    said = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    key = _get_key(recipe, config)
    if said.get("key") == key:
        raise Diverged(f"{said['message']} (in an earlier attempt; to try again, remove {note})")
    try:
        yield
    except Diverged as error:
        write_aside(note, json.dumps({"key": key, "message": str(error)}) + "\n")
        raise


def _is_trained(adapter: Path, recipe: Path) -> bool:
    record = adapter / RECORD
    if not record.is_file():
        return False
    said = json.loads(record.read_text(encoding="utf-8"))
    digests = (digest_file(recipe), digest_file(adapter / ADAPTER_WEIGHTS))
    return (said["recipe_sha256"], said["adapter_sha256"]) == digests


def _check_digest(recipe: Path, data: Path) -> str:
    """Return the digest of the training data, which is the one that the recipe names, where it names one."""
    found = digest_file(data)
    named = re.match(r"# training data sha256: (\w+)\n", recipe.read_text(encoding="utf-8"))
    if named and named[1] != found:
        raise TrainingError(
            f"{data}: has changed since {recipe} was written (sha256 {named[1][:12]}, now {found[:12]}); run again"
        )
    return found


def _run(
    recipe: Path, config: Any, point: Path, metric_loggers: Collection[str], save_minutes: float
) -> dict[str, Any]:
    """Run a recipe, and return what it measured beside its log."""
    folder = Path(config.output_dir)
    if config.device == "cpu":  # where torchtune sees a GPU, it packs samples for that
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The caches of `datasets` lie in the user's home by default, which on a cluster has a quota.
    cache = folder / "huggingface"
    os.environ |= {name: str(cache) for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE")}
    from lorasweep.trainers.torchtune import loop as torchtune_recipe
    from lorasweep.trainers.torchtune import processes as torchtune_processes
    from lorasweep.trainers.torchtune import saved_states as torchtune_state

    saved = torchtune_state.SavedStates(folder / "saved", _get_key(recipe, config))
    state = saved.load()
    for leftover in (cache, folder / "trained") if state else (folder,):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    halvings = read_halvings(recipe, config)
    given = config.copy()
    halve_batch(config, halvings)
    settings: Any = OmegaConf.to_container(config)
    log, processes = folder / TRAINING_LOG, config.get(PROCESSES, 1)
    try:
        if processes > 1:
            peak = torchtune_processes.run(processes, config, log, point, metric_loggers, saved, save_minutes, halvings)
        else:
            loggers = torchtune_recipe.make_loggers(metric_loggers, point, folder, settings)
            peak = torchtune_recipe.run(config, log, loggers, saved, state, save_minutes, halvings)
    except TrainingError:
        raise
    except Exception as error:
        traceback.print_exc()
        if re.search(OUT_OF_MEMORY, str(error)):
            first = re.split(r"[.] |\n", str(error))[0]
            raise TrainingError(f"{first}; {plan_halving(recipe, given, halvings)}") from error
        why = explain_write_failure(folder) or f"{type(error).__name__}: {error}"
        raise TrainingError(f"torchtune failed; {why}") from error
    return {"peak_memory_bytes": peak, "batch_size_used": config.batch_size}


def _get_key(recipe: Path, config: Any) -> dict[str, Any]:
    """What a saved state must be of."""
    return {
        "recipe_sha256": digest_file(recipe),
        "base_model_fingerprint": read_checkpoint(Path(config.checkpointer.checkpoint_dir)).fingerprint,
        "versions": get_versions(*_PACKAGES),
    }


def _collect(recipe: Path, config: Any, folder: Path, epochs: Iterable[int], facts: Mapping[str, Any]) -> Path:
    """Put together in `folder`, by epoch, what is published, and return it."""
    base = read_checkpoint(Path(config.checkpointer.checkpoint_dir))
    facts = {"trainer": "torchtune", "dtype": config.dtype, **facts}
    folder.mkdir()
    for epoch in epochs:
        adapter, trained = folder / str(epoch), Path(config.checkpointer.output_dir) / f"epoch_{epoch - 1}"
        _check_weights(trained / ADAPTER_WEIGHTS)
        adapter.mkdir()
        # Files of torchtune's have mode 0600; copies have what the umask says.
        shutil.copyfile(trained / ADAPTER_WEIGHTS, adapter / ADAPTER_WEIGHTS)
        peft_config = json.loads((trained / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base.path.resolve()),
        }
        (adapter / ADAPTER_CONFIG).write_text(
            json.dumps(peft_config, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        complete(adapter, base, recipe, Path(config.output_dir, TRAINING_LOG), epoch, _PACKAGES, facts)
    return folder


def _check_weights(weights: Path) -> None:
    from safetensors import SafetensorError

    try:
        check_weights(weights)
    except (OSError, SafetensorError) as error:
        # Of an attempt that went on after it: what it left can be trusted no more.
        shutil.rmtree(weights.parents[1])
        raise TrainingError(f"{weights}: cannot be read ({error}); the next attempt trains anew") from error
