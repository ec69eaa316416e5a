"""A trainer that learns nothing, for tests to which a training is one job of a sweep.

Its adapters are random, and loaded, merged and evaluated as any. A second of work stands for the ten that torchtune's
start takes. While the file that HOLD_TRAINING names is there, a training goes on: so a test decides when it ends.
"""

import json
import os
import shutil
import time
from pathlib import Path

import yaml

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.training_data import read_samples
from lorasweep.trainers.publication import complete, publish
from lorasweep.trainers.training_log import Row, TrainingLog
from lorasweep.util.digest import digest_file

STAGE = "eval"


def recipe(spec):
    controls = spec.controls.model_dump(exclude={"override"})
    said = {"output_dir": spec.output_dir, "base": str(spec.checkpoint.path), "dtype": spec.model.dtype}
    return yaml.safe_dump({**said, "data": spec.data.train, **controls})


def declared_adapter_only(override):
    return None


def measure_lengths(recipe):
    columns = {"input": "input", "output": "output"}
    return {"train": [[1, 1] for _ in read_samples([yaml.safe_load(recipe.read_text())["data"]], "instruct", columns)]}


def train(recipe, adapter, metric_loggers=(), save_minutes=0, earlier=None):
    config = yaml.safe_load(recipe.read_text())
    base = read_checkpoint(Path(config["base"]).resolve())
    state = Path(config["output_dir"], "state/train")
    shutil.rmtree(state, ignore_errors=True)
    made = state / "trained"
    made.mkdir(parents=True)
    log = TrainingLog(state / "training_log.csv")
    log.add(Row(1, config["epochs"], 1.0, config["lr"], 1, 1.0))
    log.close()
    while os.path.exists(os.environ.get("HOLD_TRAINING", "")):
        time.sleep(0.2)
    _make_adapter(base, config, made)
    facts = {"trainer": "quick_trainer", "dtype": config["dtype"], "peak_memory_bytes": None}
    facts["data_sha256"] = digest_file(Path(config["data"]))
    complete(made, base, recipe, state / "training_log.csv", config["epochs"], (), facts)
    publish(made, adapter)


def _make_adapter(base, config, made):
    """Write the weights and the configuration of a random adapter, as the settings say that it is."""
    import numpy
    from safetensors import safe_open
    from safetensors.numpy import save_file

    random = numpy.random.default_rng(config["seed"])
    rank, alpha = config["lora_rank"], config["lora_alpha"] or 2 * config["lora_rank"]
    modules = ["o_proj" if name == "output_proj" else name for name in config["lora_attn_modules"]]
    modules += ["gate_proj", "up_proj", "down_proj"] if config["apply_lora_to_mlp"] else []
    tensors = {}
    with safe_open(base.path / "model.safetensors", "np") as weights:
        for name in weights.keys():  # noqa: SIM118
            if name.endswith(tuple(f"{module}.weight" for module in modules)):
                rows, columns = weights.get_slice(name).get_shape()
                module = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = random.normal(size=(rank, columns)).astype("float32")
                tensors[f"{module}.lora_B.weight"] = random.normal(size=(rows, rank)).astype("float32")
    save_file(tensors, made / "adapter_model.safetensors", {"format": "pt"})
    settings = {"target_modules": modules, "r": rank, "lora_alpha": alpha}
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base.path), **settings}
    (made / "adapter_config.json").write_text(json.dumps(said))
