"""What share of its peak a GPU reaches in training, which a plan takes from `plan.efficiency`: needs a GPU.

    make install-test && .venv/train/bin/python benchmarks/training_efficiency.py --device h100

A random Llama of the shape of Llama 3.2 1B in bf16, rank 16 on all linear layers, samples of one length each. Seconds
are those of the training's own log, without the first steps; operations are counted as the plan counts them.
"""

import argparse
import json
import random
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflow")]

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
}
STEPS, WARM_UP = 25, 5
CASES: tuple[dict[str, Any], ...] = (
    {"tokens": 256, "batch_size": 2},
    {"tokens": 512, "batch_size": 8},
    {"tokens": 2048, "batch_size": 8},
    {"tokens": 2048, "batch_size": 8, "enable_activation_checkpointing": True},
    {"tokens": 2048, "batch_size": 8, "compile": True},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True, help="its name in the plan's table: a100, h100, ...")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=range(len(CASES)), help="of those in this file, by number"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder, "model"))
        for number in arguments.cases:
            measured = measure(Path(folder, str(number)), model, arguments.device, **CASES[number])
            print(json.dumps(CASES[number] | measured), flush=True)


def make_checkpoint(folder: Path) -> Path:
    import torch

    from tiny_model import make_model, make_tokenizer

    tokenizer = make_tokenizer(has_chat_template=True)
    with torch.device("cuda"):
        make_model("smollm2", tokenizer, seed=0, **SHAPE).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.cuda.empty_cache()
    return folder


def measure(folder: Path, model: Path, device: str, tokens: int, **controls: Any) -> dict[str, Any]:
    """Train for some steps; return tokens a second, the share of the peak, and the peak of memory in GB."""
    from lorasweep.checkpoints.checkpoint import read_checkpoint
    from lorasweep.experiment.points import Point
    from lorasweep.experiment.sections import Controls, Experiment
    from lorasweep.planning.costs import Base, Costs
    from lorasweep.planning.lengths import Lengths
    from lorasweep.trainers.torchtune.run import train
    from lorasweep.trainers.training_log import read_log
    from recipes import CONTROLS, write_recipe

    folder.mkdir()
    attention = ["q_proj", "k_proj", "v_proj", "output_proj"]
    controls |= {"lora_rank": 16, "lora_attn_modules": attention, "apply_lora_to_mlp": True, "lr": 1e-4}
    controls |= {"epochs": 1, "gradient_accumulation_steps": 1, "lora_dropout": 0.0, "max_seq_len": tokens}
    data = write_text(folder / "samples.jsonl", STEPS * controls["batch_size"], tokens)
    recipe = write_recipe(folder, model, data={"train": str(data)}, device="cuda", dtype="bf16", **controls)
    train(recipe, recipe.parent / "adapter")
    rows = read_log(recipe.parent / "adapter/training_log.csv")
    seconds = rows[-1].seconds - rows[WARM_UP - 1].seconds
    seen = rows[-1].tokens - rows[WARM_UP - 1].tokens
    experiment = Experiment.model_validate(
        {
            "experiment": {"name": "efficiency"},
            "model": {"path": str(model), "dtype": "bf16"},
            "plan": {"device": device, "efficiency": 1.0},
        }
    )
    base = Base(experiment.choose_model(None), read_checkpoint(model))
    costs = Costs(experiment, base, Lengths.count(experiment.data, [[0, tokens]] * (rows[-1].tokens // tokens)))
    settings = Controls(**{**CONTROLS, **controls})
    at_the_peak = (
        costs._train(Point("efficiency", (), settings, "B2", base.model)) / costs.get_training(settings).tokens
    )
    record = json.loads((recipe.parent / "adapter/lorasweep.json").read_text())
    return {
        "tokens_per_second": round(seen / seconds),
        "efficiency": round(at_the_peak * seen / seconds, 3),
        "peak_memory_gb": round(record["peak_memory_bytes"] / 1e9, 2),
    }


def write_text(file: Path, samples: int, tokens: int) -> Path:
    """Write samples of random letters, of which each is a token; what is longer than the limit is cut."""
    letters = random.Random(0)
    text = ["".join(letters.choices(string.ascii_lowercase, k=tokens)) for _ in range(samples)]
    half = tokens // 2
    lines = [json.dumps({"input": line[:half], "output": line[half:]}) + "\n" for line in text]
    file.write_text("".join(lines))
    return file


if __name__ == "__main__":
    main()
