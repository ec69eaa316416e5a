"""N adapters of one base: evaluated by one job that loads it once, by a job each, and merged by a job each.

    make demo && .venv/driver/bin/python benchmarks/direct.py --picture docs/direct.svg

Runs what the rules run, one after another on this machine: `evaluate_adapters` for all (B2 shared) and for each (B2 one
by one), and `evaluate_merged` for each (B1). The adapters are random, of rank 8 on all linear layers; the task is the
demo's. A second model, random and larger, shows the share of the load. Times are of whole processes, imports included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))
from lorasweep.checkpoints.checkpoint import read_checkpoint  # noqa: E402
from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec  # noqa: E402

RUN = ROOT / "scripts/run"
SHARED, EACH, MERGED = "B2 shared", "B2 one by one", "B1 merged"
WAYS = {SHARED: "#1f77b4", EACH: "#ff7f0e", MERGED: "#7f7f7f"}
RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model", help="base model")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--larger", type=float, default=1.0, help="billions of parameters of the random model; 0: none")
    parser.add_argument("--larger-adapters", type=int, nargs="+", default=[4])
    parser.add_argument("--samples", type=int, default=16, help="samples of the demo's task")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--picture", type=Path, help="SVG file to draw the curves to")
    # What needs the environment that has torch.
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_adapters(Path(arguments.make[0]), Path(arguments.make[1]), int(arguments.make[2]))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=ROOT / "benchmarks") as name:
        folder = Path(name)
        rows += measure(folder / "small", arguments.model, arguments.adapters, arguments.samples, arguments.repeats)
        if arguments.larger:
            larger = folder / f"random-{arguments.larger:g}B"
            run_eval(Path(__file__).with_name("random_model.py"), "--output", larger, "--billions", arguments.larger)
            shutil.copytree(
                arguments.model, larger, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*", "c*.json")
            )
            rows += measure(folder / "large", larger, arguments.larger_adapters, arguments.samples, arguments.repeats)
    print_goals(rows)
    if arguments.picture:
        draw([row for row in rows if row["model"] == arguments.model.name], arguments.picture)


def measure(folder: Path, model: Path, numbers: list[int], samples: int, repeats: int) -> list[dict[str, Any]]:
    """Measure every way for each number of adapters; return the medians, and print them."""
    run_eval(Path(__file__), "--make", folder / "adapters", model, max(numbers))
    rows = []
    print(
        f"{model.name}: {'way':15} {'N':>3} {'wall s':>8} {'peak MB':>8} {'written MB':>11} {'logs MB':>8} {'loads':>6}"
    )
    for number in numbers:
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                runs[way].append(run(folder, model, way, number, samples))
        for way, found in runs.items():
            row = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append({"model": model.name, "way": way, "number": number, **row})
            print(
                f"{model.name}: {way:15} {number:3} {row['wall']:8.1f} {row['peak']:8.0f} {row['written']:11.1f} "
                f"{row['logs']:8.1f} {row['loads']:6.0f}",
                flush=True,
            )
    return rows


def run(folder: Path, model: Path, way: str, number: int, samples: int) -> dict[str, float]:
    """Evaluate so many adapters; return wall time (s), largest memory of a process, bytes written (MB), loads."""
    results = folder / "results"
    shutil.rmtree(results, ignore_errors=True)
    points = [results / f"point{index}" for index in range(number)]
    for point in points:
        point.mkdir(parents=True)
        (point / "adapter").symlink_to(folder / "adapters" / point.name)
    base = read_checkpoint(model)
    spec = EvaluationSpec(
        mode="B1" if way == MERGED else "B2",
        base_model=str(model),
        base_fingerprint=base.fingerprint,
        dtype="fp32",
        device="cpu",
        system_prompt=None,
        tasks=[TaskSpec(name="capitalisation", task="demo/capitalisation.py@capitalisation", args={}, limit=samples)],
        max_connections=32,
        max_tokens=8,
        temperature=0,
        seed=0,
        files={},
    ).model_dump_json()
    if way == SHARED:
        jobs = [["evaluate_adapters", "--points", *points, "--output", results / "failed.json"]]
    elif way == EACH:
        jobs = [["evaluate_adapters", "--points", point, "--output", results / "failed.json"] for point in points]
    else:
        shared = ["--probes", results / "probes", "--merge-in", results / "merged"]
        jobs = [["evaluate", "--point", point, *shared] for point in points]
    wall, peak, written, loads = 0.0, 0, 0, 0
    for word, *options in jobs:
        with tempfile.TemporaryFile("w+") as log:
            command = [RUN, "eval", "-m", "lorasweep", "job", word, "--spec", spec, *options]
            began = time.monotonic()
            process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
            wall += time.monotonic() - began
            log.seek(0)
            said = log.read()
            if status:
                sys.exit(said[-3000:])
        peak, written = max(peak, used.ru_maxrss * 1024), written + used.ru_oublock * 512
        loads += said.count("Loading weights: 100%")
    if way != MERGED:
        assert json.loads((results / "failed.json").read_text()) == {}
    found = list(results.glob("*/eval/*" if way == MERGED else "*/state/eval/done/*"))
    assert len(found) == 2 * number
    logs = sum(file.stat().st_size for file in found)
    return {"wall": wall, "peak": peak / 1e6, "written": written / 1e6, "logs": logs / 1e6, "loads": loads}


def print_goals(rows: list[dict[str, Any]]) -> None:
    for model in dict.fromkeys(row["model"] for row in rows):
        by = {(row["way"], row["number"]): row for row in rows if row["model"] == model}
        for number in sorted({row["number"] for row in rows if row["model"] == model}):
            shared = by[SHARED, number]
            merged, each = by[MERGED, number]["wall"], by[EACH, number]["wall"]
            smallest = by[SHARED, min(n for _, n in by)]["peak"]
            print(
                f"{model}, N = {number}: B2 shared takes {shared['wall'] / merged:.2f} of B1's time, "
                f"{shared['wall'] / each:.2f} of that of B2 one by one; its peak memory is "
                f"{shared['peak'] / smallest:.2f} of that of the smallest N; {shared['loads']:.0f} load of the base"
            )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw wall time and bytes written by the number of adapters."""
    import matplotlib as mpl
    import matplotlib.figure

    mpl.rcParams["svg.hashsalt"] = "lorasweep"
    figure = mpl.figure.Figure(figsize=(9, 3), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("wall", "written"), ("wall time, s", "written, MB"), strict=True
    ):
        for way, colour in WAYS.items():
            curve = [row for row in rows if row["way"] == way]
            axes.plot([row["number"] for row in curve], [row[key] for row in curve], "o-", color=colour, label=way)
        axes.set_xlabel("adapters")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


def run_eval(script: Path, *arguments: object) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([RUN, "eval", script, *map(str, arguments)], check=True, **quiet)


def make_adapters(folder: Path, model: Path, count: int) -> None:
    """Have PEFT make adapters that change the model: what it leaves at zero is random."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    for index in range(count):
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        adapted.save_pretrained(folder / f"point{index}")


if __name__ == "__main__":
    main()
