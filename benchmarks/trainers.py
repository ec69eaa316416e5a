"""Seconds and memory of a step by torchtune and by trl, on SmolLM2-135M: the same settings, data and order.

    make install && .venv/eval/bin/python demo/prepare.py && .venv/driver/bin/python benchmarks/trainers.py

Runs the job `train` of each trainer in turn, several times, on this machine's CPU: LoRA on all linear layers, as the
demo has it, on the demo's samples, and on samples of some 200 tokens that are made of them. Seconds of a step are from
the training's own log, without the first steps; memory is the peak of the whole job (resident set size), which has the
imports and the base model in it. Prints medians over all steps and runs, and the ratio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))
from lorasweep.checkpoints.checkpoint import read_checkpoint  # noqa: E402
from lorasweep.experiment.sections import Controls, Data, Model  # noqa: E402
from lorasweep.trainers import TrainingSpec, get_trainer  # noqa: E402
from lorasweep.trainers.training_log import read_log  # noqa: E402

RUN = ROOT / "scripts/run"
WARM_UP = 3
SAMPLES = {"the demo's samples": (1, 8), "samples of 200 tokens": (15, 2)}
"""How many of the demo's samples are one, and how many of those are a batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model")
    parser.add_argument("--trainers", nargs="+", default=["torchtune", "trl"])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name, (joined, batch_size) in SAMPLES.items():
        seconds: dict[str, list[float]] = {trainer: [] for trainer in arguments.trainers}
        peaks: dict[str, list[float]] = {trainer: [] for trainer in arguments.trainers}
        tokens: dict[str, int] = {}
        with tempfile.TemporaryDirectory() as folder:
            data = write_samples(Path(folder, "train.jsonl"), joined, arguments.steps * batch_size)
            for repeat in range(arguments.repeats):
                for trainer in arguments.trainers:
                    spec = TrainingSpec(
                        checkpoint=read_checkpoint(arguments.model.resolve()),
                        controls=make_controls(batch_size),
                        swept=(),
                        model=Model(path=str(arguments.model), device="cpu", dtype=arguments.dtype),
                        data=Data(train=str(data)),
                        output_dir=f"{folder}/trainings/{trainer}-{repeat}",
                    )
                    found, tokens[trainer], peak = train(trainer, spec)
                    seconds[trainer] += found
                    peaks[trainer].append(peak)
        print(f"{name}, {arguments.dtype}, {batch_size} a step, on {len(os.sched_getaffinity(0))} cores:")
        for trainer in arguments.trainers:
            print(
                f"  {trainer:10} {median(seconds[trainer]):.3f} s a step ({min(seconds[trainer]):.3f} to "
                f"{max(seconds[trainer]):.3f}, {len(seconds[trainer])} steps), {median(peaks[trainer]):.0f} MB, "
                f"{tokens[trainer]} tokens"
            )
        first, *others = arguments.trainers
        for trainer in others:
            time_ratio = median(seconds[trainer]) / median(seconds[first])
            memory_ratio = median(peaks[trainer]) / median(peaks[first])
            print(f"  {trainer} / {first}: {time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory", flush=True)


def make_controls(batch_size: int) -> Controls:
    """The demo's, at rank 8."""
    return Controls(
        epochs=1,
        batch_size=batch_size,
        lr=1e-3,
        lora_rank=8,
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
    )


def write_samples(file: Path, joined: int, count: int) -> Path:
    """Write so many samples, each of which joins several of the demo's."""
    lines = (ROOT / "demo/train.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    with file.open("w", encoding="utf-8") as made:
        for start in range(count):
            parts = [samples[(start * joined + i) % len(samples)] for i in range(joined)]
            whole = {key: "\n".join(part[key] for part in parts) for key in ("input", "output")}
            made.write(json.dumps(whole) + "\n")
    return file


def train(trainer: str, spec: TrainingSpec) -> tuple[list[float], int, float]:
    """Run the job; return the seconds of its steps after the first ones, its tokens, and its peak of memory in MB."""
    folder = Path(spec.output_dir)
    folder.mkdir(parents=True)
    recipe, adapter = folder / "recipe.yaml", folder / "adapter"
    recipe.write_text(get_trainer(trainer).recipe(spec))
    command = [RUN, get_trainer(trainer).STAGE, "-m", "lorasweep", "job", "train", "--trainer", trainer]
    command += ["--recipe", recipe, "--adapter", adapter]
    with (folder / "said.log").open("w") as said:
        job = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, usage = os.wait4(job.pid, 0)
    if status:
        sys.exit((folder / "said.log").read_text()[-4000:])
    rows = read_log(adapter / "training_log.csv")
    seconds = [after.seconds - before.seconds for before, after in pairwise(rows)]
    return seconds[WARM_UP - 1 :], rows[-1].tokens, usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
