"""Run a recipe with torchtune's `lora_finetune_single_device`, or on several GPUs `lora_finetune_distributed`.

Every mode trains and saves adapters only. torchtune's export of full models adds the update to the live weights, which
on a CPU corrupts the model from the second epoch on.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
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
from lorasweep.util.digest import digest_file, digest_files
from lorasweep.util.errors import InputError, describe
from lorasweep.util.files import explain_write_failure, hold_alone, write_aside, write_record
from lorasweep.util.versions import get_versions

STAGE = "train"


_PACKAGES = ("torch", "torchtune", "torchao", "transformers", "datasets")
"""Packages that a training's results depend on."""

_CACHES = ("HF_DATASETS_CACHE", "HF_MODULES_CACHE")
"""Environment variables of the caches of `datasets`, which are in the home directory by default."""

_DIVERGENCE_NOTE = "train.diverged.json"


def measure_lengths(recipe: Path) -> dict[str, list[list[int]]]:
    """Return the numbers of tokens in the parts of every training and validation sample; see `Trainer`."""
    with tempfile.TemporaryDirectory() as cache:  # of a dataset component of the user's; instead of the home directory
        os.environ |= dict.fromkeys(_CACHES, cache)
        from torchtune import config as components

        config: Any = OmegaConf.load(recipe)
        config.tokenizer.max_seq_len = None
        tokenizer = components.instantiate(config.tokenizer)
        measured = {}
        for key, name in (("train", "dataset"), ("validation", "dataset_val")):
            if section := config.get(name):
                if "packed" in section:
                    section.packed = False
                dataset = components.instantiate(section, tokenizer)
                measured[key] = [_get_parts(dataset[index]) for index in range(len(dataset))]
        return measured


def _get_parts(sample: Mapping[str, Any]) -> list[int]:
    from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

    runs = [(key, len(list(run))) for key, run in groupby(sample["labels"], lambda x: x != CROSS_ENTROPY_IGNORE_IDX)]
    return [0] * runs[0][0] + [length for _, length in runs]


def find_faults(recipe: str) -> dict[str, str]:
    """Return why parts of a recipe, given as text, cannot be built, by section; empty if nothing is wrong."""
    from lorasweep.trainers.torchtune import building

    return building.find_faults(recipe)


def train(
    recipe: Path,
    adapter: Path,
    metric_loggers: Collection[str] = (),
    save_minutes: float = SAVE_MINUTES,
    earlier: Mapping[int, Path] | None = None,
) -> None:
    """Run a recipe, and publish the adapters of its last epoch and of the `earlier` epochs, each in its directory.

    `adapter` appears complete or not at all: the weights as safetensors, PEFT's configuration, the base model's
    tokenizer, the log of the training, and a record of its inputs. It has no `config.json`, which would make
    transformers load it as a full model.

    Trained adapters are also kept in the point's state until the point is cleaned up. So a training that outlives its
    run is not repeated by the next run. An interrupted training resumes from its last saved state, and gives bit for
    bit the same result as without the interruption. States of another recipe, base model or version are dropped.

    Raises:
        Diverged: a loss or a value of the update is not finite, now or in an earlier attempt at the same training.
        Stopped: the training was told to stop. Its state is saved.
        TrainingError: torchtune failed, the update is zero, or the recipe has no such epoch.
    """
    config = OmegaConf.load(recipe)
    targets = {**(earlier or {}), config.epochs: adapter}
    if max(targets) > config.epochs:
        raise TrainingError(f"{recipe}: has {config.epochs} epochs, but the adapter of epoch {max(targets)} is wanted")
    state = Path(config.output_dir)
    trained = state.with_name("trained")
    with hold_alone(state.with_name("train.lock"), f"training {adapter.parent.name}"):
        if all(_is_trained(trained / str(epoch), recipe) for epoch in targets):
            print(f"This recipe was trained by an earlier run, which ended before the training: using {trained}.")
        else:
            shutil.rmtree(trained, ignore_errors=True)
            facts = {"data_sha256": _check_digest(recipe, config.dataset.data_files)}
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
    """Record a divergence, and refuse to repeat it: the same recipe, model and versions would diverge again."""
    note = Path(config.output_dir).with_name(_DIVERGENCE_NOTE)
    earlier = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    key = _get_key(recipe, config)
    if earlier.get("key") == key:
        raise Diverged(f"{earlier['message']} (in an earlier attempt; to try again, remove {note})")
    try:
        yield
    except Diverged as error:
        write_aside(note, json.dumps({"key": key, "message": str(error)}) + "\n")
        raise


def _is_trained(adapter: Path, recipe: Path) -> bool:
    record = adapter / RECORD
    if not record.is_file():
        return False
    content = json.loads(record.read_text(encoding="utf-8"))
    digests = (digest_file(recipe), digest_file(adapter / ADAPTER_WEIGHTS))
    return (content["recipe_sha256"], content["adapter_sha256"]) == digests


def _check_digest(recipe: Path, data: str | Iterable[str]) -> str:
    """Return the sha256 of the training data, after comparing it with the one in the recipe, if there is one."""
    files = [data] if isinstance(data, str) else list(data)
    actual = digest_files(files)
    named = re.search(r"(?m)^# training data sha256: ([\w ]+)$", recipe.read_text(encoding="utf-8"))
    if named and named[1] != actual:
        raise TrainingError(
            f"{', '.join(files)}: has changed since {recipe} was written (sha256 {named[1][:12]}, now {actual[:12]}); "
            "run again"
        )
    return actual


def _run(
    recipe: Path, config: Any, point: Path, metric_loggers: Collection[str], save_minutes: float
) -> dict[str, Any]:
    """Run a recipe, and return the values for its record that are not in its log."""
    folder = Path(config.output_dir)
    if config.device == "cpu":  # if torchtune sees a GPU, it packs samples for the GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # By default the caches of `datasets` are in the user's home directory, which on a cluster has a quota.
    cache = folder / "huggingface"
    os.environ |= {name: str(cache) for name in _CACHES}
    from lorasweep.trainers.torchtune import loop as torchtune_recipe
    from lorasweep.trainers.torchtune import processes as torchtune_processes
    from lorasweep.trainers.torchtune import saved_states as torchtune_state

    saved = torchtune_state.SavedStates(folder / "saved", _get_key(recipe, config))
    state = saved.load()
    for leftover in (cache, folder / "trained") if state else (folder,):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    halvings = read_halvings(recipe, config)
    original = config.copy()
    halve_batch(config, halvings)
    settings: Any = OmegaConf.to_container(config)
    log, processes = folder / TRAINING_LOG, config.get(PROCESSES, 1)
    try:
        if processes > 1:
            peak = torchtune_processes.run(processes, config, log, point, metric_loggers, saved, save_minutes, halvings)
        else:
            loggers = torchtune_recipe.make_loggers(metric_loggers, point, folder, settings)
            peak = torchtune_recipe.run(config, log, loggers, saved, state, save_minutes, halvings)
    except (TrainingError, InputError):
        raise
    except Exception as error:
        traceback.print_exc()
        if re.search(OUT_OF_MEMORY, str(error)):
            first = re.split(r"[.] |\n", str(error))[0].rpartition("Error: ")[2]
            raise TrainingError(f"{first}; {plan_halving(recipe, original, halvings)}\n{describe(error)}") from error
        why = explain_write_failure(folder) or describe(error)
        raise TrainingError(f"torchtune failed; {why}") from error
    return {"peak_memory_bytes": peak, "batch_size_used": config.batch_size}


def _get_key(recipe: Path, config: Any) -> dict[str, Any]:
    """Return the key of a training: only states and divergences with the same key apply to it.

    The folder of the training may have moved since.
    """
    text = recipe.read_text(encoding="utf-8").replace(str(Path(config.output_dir).parents[1]), "")
    return {
        "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "base_model_fingerprint": read_checkpoint(Path(config.checkpointer.checkpoint_dir)).fingerprint,
        "versions": get_versions(*_PACKAGES),
    }


def _collect(recipe: Path, config: Any, folder: Path, epochs: Iterable[int], facts: Mapping[str, Any]) -> Path:
    """Make the directories to publish, `folder/EPOCH`, and return `folder`."""
    base = read_checkpoint(Path(config.checkpointer.checkpoint_dir))
    facts = {"trainer": "torchtune", "dtype": config.dtype, **_get_prompt_facts(config), **facts}
    folder.mkdir()
    for epoch in epochs:
        adapter, trained = folder / str(epoch), Path(config.checkpointer.output_dir) / f"epoch_{epoch - 1}"
        _check_weights(trained / ADAPTER_WEIGHTS)
        adapter.mkdir()
        # torchtune's files have mode 0600. Copies follow the umask.
        shutil.copyfile(trained / ADAPTER_WEIGHTS, adapter / ADAPTER_WEIGHTS)
        peft_config = json.loads((trained / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base.path.resolve()),
        }
        write_record(adapter / ADAPTER_CONFIG, peft_config)
        complete(adapter, base, recipe, Path(config.output_dir, TRAINING_LOG), epoch, _PACKAGES, facts)
    return folder


def _get_prompt_facts(config: Any) -> dict[str, Any]:
    """Return what a record says of prompts: the tokens that end an answer, the one that is taught first; the date."""
    from torchtune import config as components

    tokenizer = components.instantiate(config.tokenizer)
    end = tokenizer.plain_end if config.dataset.get("format") == "completion" else tokenizer.end
    day = config.tokenizer.get("template_date")
    return {"end_tokens": end.names, **({"template_date": day} if day else {})}


def _check_weights(weights: Path) -> None:
    from safetensors import SafetensorError

    try:
        check_weights(weights)
    except (OSError, SafetensorError) as error:
        # An earlier attempt wrote this file before it was interrupted. None of its files can be trusted.
        shutil.rmtree(weights.parents[1])
        raise TrainingError(f"{weights}: cannot be read ({error}); the next attempt trains from the start") from error
