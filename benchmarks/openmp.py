"""What a training costs beside other jobs, by what torch's waiting threads do: OMP_WAIT_POLICY, passive or active.

    make install-test && .venv/train/bin/python benchmarks/openmp.py

A random Llama as wide as SmolLM2-135M trains as in a job, alone and beside a busy process for each core, interleaved.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "workflow")]

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
STEPS, WARM_UP, POLICIES = 10, 2, ("passive", "active")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    seconds: dict[tuple[int, str], list[float]] = {(busy, policy): [] for busy in (0, cores) for policy in POLICIES}
    with tempfile.TemporaryDirectory() as folder:
        model = make_checkpoint(Path(folder, "model"))
        for repeat in range(arguments.repeats):
            for number, ((busy, policy), found) in enumerate(seconds.items()):
                with keep_busy(busy):
                    found.append(measure(Path(folder, f"{repeat}.{number}"), model, policy))
                print(f"{repeat + 1}: beside {busy} busy processes, {policy}: {found[-1]:.3f} s a step", flush=True)
    for busy in (0, cores):
        passive, active = (median(seconds[busy, policy]) for policy in POLICIES)
        print(f"medians beside {busy}: {passive:.3f} s passive, {active:.3f} active, ratio {active / passive:.2f}")


def make_checkpoint(folder: Path) -> Path:
    from tiny_model import make_model, make_tokenizer

    tokenizer = make_tokenizer(has_chat_template=True)
    make_model("smollm2", tokenizer, seed=0, **SHAPE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def keep_busy(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(folder: Path, model: Path, policy: str) -> float:
    """Train for some steps as a job does; return the seconds of one."""
    from lorasweep.trainers.training_log import read_log
    from recipes import write_recipe

    folder.mkdir()
    controls = {"epochs": 1, "batch_size": 2, "gradient_accumulation_steps": 1, "max_steps_per_epoch": STEPS}
    recipe = write_recipe(folder, model, **controls)
    adapter = recipe.parent / "adapter"
    command = [
        ROOT / "scripts/run",
        "train",
        "-m",
        "lorasweep",
        "job",
        "train",
        "--recipe",
        recipe,
        "--adapter",
        adapter,
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_WAIT_POLICY": policy})
    rows = read_log(adapter / "training_log.csv")
    return (rows[-1].seconds - rows[WARM_UP - 1].seconds) / (len(rows) - WARM_UP)


if __name__ == "__main__":
    main()
