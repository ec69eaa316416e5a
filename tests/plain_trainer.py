"""A second trainer for the tests: PEFT and a plain loop without schedule or dropout, where evaluations run."""

import random
import shutil
from pathlib import Path

import yaml

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.training_data import read_samples
from lorasweep.trainers import TrainingError
from lorasweep.trainers.publication import check_weights, complete, publish
from lorasweep.trainers.training_log import Row, TrainingLog
from lorasweep.util.digest import digest_files
from lorasweep.util.errors import InputError

STAGE = "eval"


def recipe(spec):
    controls = spec.controls.model_dump(exclude={"override"})
    if spec.controls.override or spec.controls.gpus > 1 or spec.data.format != "instruct" or spec.data.validation:
        raise InputError(
            "plain_trainer takes no _override, one GPU, no validation data, and data.format: instruct alone"
        )
    said = {"output_dir": spec.output_dir, "base": str(spec.checkpoint.path), "dtype": spec.model.dtype}
    data = {"files": list(spec.data.get_files("train")), "columns": spec.data.columns, "too_long": spec.data.too_long}
    return yaml.safe_dump({**said, "data": data, **controls})


def declared_adapter_only(override):
    return None


def measure_lengths(recipe):
    samples = _tokenize(yaml.safe_load(recipe.read_text()))
    return {"train": [[labels.count(-100), len(tokens) - labels.count(-100)] for _, tokens, labels in samples]}


def _tokenize(config):
    from transformers import AutoTokenizer

    tokenizer, data = AutoTokenizer.from_pretrained(config["base"]), config["data"]
    for sample in read_samples(data["files"], "instruct", data["columns"]):
        question, answer = ({"role": role, "content": content} for role, content in sample.messages)
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
        tokens = tokenizer.apply_chat_template([question, answer])["input_ids"]
        yield sample.place, tokens, [-100] * len(prompt) + tokens[len(prompt) :]


def _read_samples(config):
    samples, too_long = [], config["data"]["too_long"]
    for place, tokens, labels in _tokenize(config):
        limit = config["max_seq_len"] or len(tokens)
        if len(tokens) > limit and too_long == "error":
            raise TrainingError(f"{place}: has {len(tokens)} tokens, more than max_seq_len = {limit}")
        if len(tokens) <= limit or (too_long == "truncate" and labels[:limit].count(-100) < limit):
            samples.append((tokens[:limit], labels[:limit]))
    return samples


def train(recipe, adapter, metric_loggers=(), save_minutes=0, earlier=None):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = yaml.safe_load(recipe.read_text())
    base = read_checkpoint(Path(config["base"]).resolve())
    torch.manual_seed(config["seed"])
    names = {"output_proj": "o_proj"}
    modules = [names.get(name, name) for name in config["lora_attn_modules"]]
    modules += ["gate_proj", "up_proj", "down_proj"] * config["apply_lora_to_mlp"]
    alpha = config["lora_alpha"] or 2 * config["lora_rank"]
    lora = LoraConfig(r=config["lora_rank"], lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(
        base.path, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[config["dtype"]]
    )
    model = get_peft_model(model, lora)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"])
    samples, size = _read_samples(config), config["batch_size"] * config["gradient_accumulation_steps"]
    state = Path(config["output_dir"], "state/train")
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    targets = {**(earlier or {}), config["epochs"]: adapter}
    log_file = state / "training_log.csv"
    log, steps, tokens = TrainingLog(log_file), 0, 0
    for epoch in range(1, config["epochs"] + 1):
        random.Random(epoch).shuffle(samples)
        for start in range(0, len(samples) - size + 1, size)[: config["max_steps_per_epoch"]]:
            batch, steps = samples[start : start + size], steps + 1
            learnt = sum(label != -100 for _, labels in batch for label in labels)
            losses = []
            for sample, labels in batch:
                count = sum(label != -100 for label in labels)
                loss = model(torch.tensor([sample]), labels=torch.tensor([labels])).loss * count / learnt
                loss.backward()
                losses.append(float(loss))
            if not sum(losses) < float("inf"):
                raise TrainingError(f"the training diverged: the loss of step {steps} is {sum(losses)}")
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(len(sample) for sample, _ in batch)
            log.add(Row(steps, epoch, sum(losses), config["lr"], tokens, float(steps)))
        if epoch in targets:
            made = state / "trained" / str(epoch)
            model.save_pretrained(made)
            check_weights(made / "adapter_model.safetensors")
            facts = {"trainer": "plain_trainer", "dtype": config["dtype"], "peak_memory_bytes": None}
            facts["data_sha256"] = digest_files(config["data"]["files"])
            complete(made, base, recipe, log_file, epoch, ("torch", "peft"), facts)
    log.close()
    for epoch, target in targets.items():
        publish(state / "trained" / str(epoch), target)
