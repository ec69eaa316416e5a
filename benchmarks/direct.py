"""N adapters of one base: evaluated by one job that loads it once, by a job each, and merged by a job each.

    make demo && .venv/driver/bin/python benchmarks/direct.py --picture docs/direct.svg

Runs what the rules run, one after another on this machine: `evaluate_adapters` for all (B2 shared) and for each (B2 one
by one), and `merge` and `evaluate` for each (B1). The adapters are random, of rank 8 on all linear layers; the task is
the demo's. A second model, random and larger, shows the share of the load. Times are of whole processes, imports
included.

Then, in one process, it measures an adapter merged in memory beside the merged model: the time of generation, the time
of a switch beside that of reading the switched weights from the mapped checkpoint and writing them to memory once, and
how many of 40 answers are equal in each precision.
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
    parser.add_argument("--compare", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make_adapters(Path(arguments.make[0]), Path(arguments.make[1]), int(arguments.make[2]))
        return
    if arguments.compare:
        base, adapters, folder = map(Path, arguments.compare)
        for dtype in ("fp32", "bf16", "fp16"):
            compare(base, adapters, folder, dtype)
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
        run_eval(
            Path(__file__), "--compare", arguments.model, folder / "small/adapters", folder / "merged", quiet=False
        )
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
        jobs = [["evaluate_adapters", "--spec", spec, "--points", *points, "--output", results / "failed.json"]]
    elif way == EACH:
        options = ["--spec", spec, "--output", results / "failed.json"]
        jobs = [["evaluate_adapters", *options, "--points", point] for point in points]
    else:
        jobs = []
        for point in points:
            full, adapter = results / "merged" / point.name, point / "adapter"
            merging = ["--base", model, "--adapter", adapter, "--output", full, "--dtype", "fp32", "--temporary"]
            jobs.append(["merge", *merging])
            jobs.append(["evaluate", "--spec", spec, "--point", point, "--model", full, "--probes", results / "probes"])
    wall, peak, written, loads = 0.0, 0, 0, 0
    for word, *options in jobs:
        with tempfile.TemporaryFile("w+") as log:
            command = [RUN, "eval", "-m", "lorasweep", "job", word, *options]
            began = time.monotonic()
            process = subprocess.Popen([str(part) for part in command], cwd=ROOT, stdout=log, stderr=log)
            _, status, used = os.wait4(process.pid, 0)
            wall += time.monotonic() - began
            log.seek(0)
            said = log.read()
            if status:
                sys.exit(said[-3000:])
        if word == "evaluate":
            shutil.rmtree(results / "merged")
        peak, written = max(peak, used.ru_maxrss * 1024), written + used.ru_oublock * 512
        loads += said.count("Loading weights: 100%")
    if way != MERGED:
        assert json.loads((results / "failed.json").read_text()) == {}
    found = list(results.glob("*/eval/*" if way == MERGED else "*/state/eval/done/*"))
    found = [file for file in found if file.suffix != ".py"]
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


def run_eval(script: Path, *arguments: object, quiet: bool = True) -> None:
    output = subprocess.DEVNULL if quiet else None
    subprocess.run([RUN, "eval", script, *map(str, arguments)], check=True, stdout=output, stderr=subprocess.DEVNULL)


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


def compare(base: Path, adapters: Path, folder: Path, dtype: str) -> None:
    """Print how an adapter merged in memory compares with the merged model, in one precision."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorasweep.adapters.adapter import read_adapter
    from lorasweep.adapters.in_memory import ModelInMemory
    from lorasweep.adapters.merge import merge
    from lorasweep.checkpoints.tensors import get_torch_name
    from lorasweep.evaluation.shared_base import SharedBase

    checkpoint = read_checkpoint(base)
    read = [read_adapter(path, checkpoint) for path in sorted(adapters.iterdir())[:4]]
    merge(base, read[0].path, folder, dtype)
    loaded = {"dtype": getattr(torch, get_torch_name(dtype))}
    merged = AutoModelForCausalLM.from_pretrained(folder, **loaded)
    held = AutoModelForCausalLM.from_pretrained(base, **loaded)
    shared = SharedBase(held, checkpoint)
    names = [shared.attach(adapter)[0] for adapter in read]
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    lines = (ROOT / "demo/test.jsonl").read_text().splitlines()[:40]
    inputs = tokenizer([json.loads(line)["input"] for line in lines], return_tensors="pt", padding=True)
    options = {**inputs, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    ours, theirs = [], []
    torch.set_num_threads(1)  # so that a thread's time is not spent on waiting for others
    shared.probe(names[0])
    for _ in range(2):  # in turn, so that a busy machine slows both
        began = time.process_time()
        expected = merged.generate(**options)
        middle = time.process_time()
        found = shared.generate(names[0], **options)
        theirs.append(middle - began)
        ours.append(time.process_time() - middle)
    equal = sum(bool(torch.equal(one, other)) for one, other in zip(found, expected, strict=True))
    weights = dict(merged.state_dict())
    same = sum(bool(torch.equal(tensor, weights[name])) for name, tensor in held.state_dict().items())
    shared.restore()
    holder, parameters = ModelInMemory(held, checkpoint), held.state_dict()
    switches, passes = [], []
    for _ in range(5):
        began = time.process_time()
        for adapter in read:
            holder.merge(adapter)
        switches.append((time.process_time() - began) / len(read))
        began = time.process_time()
        with safe_open(base / checkpoint.shards[0], framework="pt") as file:
            for name in read[0].updates:
                parameters[name].copy_(file.get_tensor(name))
        passes.append(time.process_time() - began)
    print(
        f"{dtype}: {same} of {len(weights)} tensors and {equal} of {len(lines)} answers are those of the merged model; "
        f"generation takes {min(ours) / min(theirs):.3f} of its time; a switch takes {min(switches):.3f} s of the CPU, "
        f"{min(switches) / min(passes):.2f} of the time of reading and writing the same weights once",
        flush=True,
    )


if __name__ == "__main__":
    main()
