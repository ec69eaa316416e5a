"""What `prune` saves, and whether the same setting wins: 16 settings of SmolLM2-135M for 4 epochs, with three seeds.

    make demo && .venv/driver/bin/python benchmarks/pruning.py

For each seed, the sweep runs twice on this machine: whole, and with half of the settings stopped after epochs 1 and 2.
Both are evaluated on the demo's task. Printed are the seconds of training, by the trainings' own logs and by their jobs
(which load the model again for each part), and both winners with their scores. It is counted how many of the adapters
that were trained to the end are those of the whole sweep, byte for byte.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))
from lorasweep.results.replicates import SETTING_TEXTS  # noqa: E402
from lorasweep.stages import TRAINER_RULES  # noqa: E402

WHOLE, PRUNED = "whole", "pruned"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3, 1e-2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--after", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=40, help="samples of the demo's task")
    parser.add_argument("--train", type=int, default=64, help="samples of the training data")
    parser.add_argument("--held-out", type=int, default=30, help="samples of the validation data")
    parser.add_argument("--in", type=Path, dest="folder", help="a folder that stays; an interrupted benchmark goes on")
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments.folder.resolve(), arguments)
        return
    with tempfile.TemporaryDirectory(prefix="lorasweep-pruning-") as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    prepare(folder, arguments)
    head = ("seed", "training s", "ratio", "jobs s", "ratio", "whole: best", "pruned: best", "same", "stayed equal")
    print(" | ".join(head))
    ratios = []
    for seed in arguments.seeds:
        whole, pruned = (run(folder, f"{kind}_{seed}", seed, kind, arguments) for kind in (WHOLE, PRUNED))
        steps, jobs = ([count_logged(each) for each in (whole, pruned)], [count_jobs(each) for each in (whole, pruned)])
        ratios.append(steps[1] / steps[0])
        best = [read_best(each) for each in (whole, pruned)]
        equal = count_equal(whole, pruned)
        cells = (
            f"{seed}",
            f"{steps[0]:.0f} / {steps[1]:.0f}",
            f"{steps[1] / steps[0]:.2f}",
            f"{jobs[0]:.0f} / {jobs[1]:.0f}",
            f"{jobs[1] / jobs[0]:.2f}",
            *(f"{name} {score:.3f} [{low:.3f}, {high:.3f}]" for name, score, low, high in best),
            "yes" if best[0][0] == best[1][0] else "within the noise" if best[1][1] >= best[0][2] else "no",
            f"{equal[0]} of {equal[1]}",
        )
        print(" | ".join(cells), flush=True)
    print(f"pruned / whole: {sum(ratios) / len(ratios):.2f} of the training time, mean of {len(ratios)} seeds")


def prepare(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the data; the task's file is beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "demo/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "held_out.jsonl").write_text("".join(lines[: arguments.held_out]), encoding="utf-8")
    train = lines[arguments.held_out : arguments.held_out + arguments.train]
    (folder / "train.jsonl").write_text("".join(train), encoding="utf-8")
    shutil.copytree(ROOT / "demo", folder / "demo", dirs_exist_ok=True, ignore=lambda *_: {"model", "downloads"})


def run(folder: Path, name: str, seed: int, kind: str, arguments: argparse.Namespace) -> Path:
    """Run a sweep to its end; return its folder of results."""
    experiment: dict[str, Any] = {
        "experiment": {"name": name},
        "variables": {"lora_rank": arguments.ranks, "lr": arguments.rates},
        "controls": {
            "epochs": arguments.epochs,
            "batch_size": 8,
            "seed": seed,
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
        },
        "model": {"path": str(arguments.model.resolve()), "dtype": "fp32", "device": arguments.device},
        "data": {"train": "train.jsonl", "validation": "held_out.jsonl"},
        "evaluation": {
            "merge_adapters": False,
            "max_tokens": 12,
            "tasks": [{"task": "demo/capitalisation.py@capitalisation", "limit": arguments.samples}],
        },
        **({"prune": {"after": arguments.after, "keep": arguments.keep}} if kind == PRUNED else {}),
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", folder]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(
            [*map(str, command), "--configfile", file, "--cores", "2"], cwd=ROOT, stdout=log, stderr=log
        )
    if done.returncode:
        sys.exit(f"{name} failed: see {folder / f'{name}.log'}")
    return folder / "results" / name


def count_logged(results: Path) -> float:
    """Return the seconds of all trainings by their logs, in which loading and validation before a step are not."""
    logs = results.glob("lora_rank=*/adapter/training_log.csv")
    return sum(float(pd.read_csv(log)["seconds"].iloc[-1]) for log in logs)


def count_jobs(results: Path) -> float:
    """Return the seconds of all jobs of trainings."""
    jobs = pd.read_csv(results / "jobs.csv")
    return float(jobs[jobs["rule"].isin(TRAINER_RULES)]["seconds"].sum())


def read_best(results: Path) -> tuple[str, float, float, float]:
    """Return the best setting, and its score with the interval."""
    answer = json.loads((results / "answer.json").read_text(encoding="utf-8"))
    rows = pd.read_csv(results / "replicates.csv", dtype=SETTING_TEXTS).set_index("trained_setting")
    name, metric = answer["best"] or answer["equal"][0], answer["metric"]
    row = rows.loc[name]
    return name, float(row[metric]), float(row[f"{metric}:low"]), float(row[f"{metric}:high"])


def count_equal(whole: Path, pruned: Path) -> tuple[int, int]:
    """Return how many adapters that were trained to the end are those of the whole sweep, and of how many."""
    tables = [pd.read_parquet(each / "results.parquet").set_index("point") for each in (whole, pruned)]
    stayed = tables[1][tables[1]["pruned_after"].isna() & (tables[1]["mode"] != "base")]
    return int((stayed["adapter_sha256"] == tables[0].loc[stayed.index, "adapter_sha256"]).sum()), len(stayed)


if __name__ == "__main__":
    main()
