"""The three modes on SmolLM2-135M: are their completions the same, and how far apart are their logits?

    make demo && .venv/driver/bin/python benchmarks/parity.py

One training of the demo in each mode (fp32, greedy), then every way to apply the adapter: merged into a full model (A),
by PEFT, by transformers from the adapter's folder, and by torchtune itself, which trains the same recipe once more.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from sweep import MODES, POINTS, run_stage  # noqa: E402

NAME = "parity"
RESULTS = Path("results") / NAME
TOKENS = ",".join(str(7919 * (i + 1) % 49152) for i in range(48))


def main() -> None:
    experiment = yaml.safe_load((ROOT / "config/demo.yaml").read_text()) | MODES
    experiment["experiment"] = {"name": NAME, "question": "Do the modes agree?"}
    with tempfile.TemporaryDirectory() as folder:
        configfile = Path(folder, "parity.yaml")
        configfile.write_text(yaml.safe_dump(experiment, sort_keys=False))
        command = [sys.executable, "-m", "snakemake", "--configfile", configfile, "--cores", "all"]
        subprocess.run([*command, "--quiet", "all"], cwd=ROOT, check=True)
        compare_logits(Path(folder))
    compare_completions()


def compare_completions() -> None:
    logs = {mode: ROOT / RESULTS / point / "eval/capitalisation.eval" for mode, point in POINTS.items()}
    logs["base"] = ROOT / RESULTS / "baseline/eval/capitalisation.eval"
    read = json.loads(run_stage("eval", "e2e/read_logs.py", *logs.values()))
    completions = {mode: read[str(log)]["completions"] for mode, log in logs.items()}
    for mode in ("B1", "B2", "base"):
        equal = sum(completions[mode][sample] == text for sample, text in completions["A"].items())
        print(f"completions of A and {mode}: {equal} of {len(completions['A'])} equal")


def compare_logits(folder: Path) -> None:
    point = RESULTS / POINTS["A"]
    models = ["--base", "demo/model", "--adapter", point / "adapter", "--merged", point / "hf_model"]
    run_stage("eval", "e2e/hf_logits.py", *models, "--tokens", TOKENS, "--output", folder / "hf.safetensors")
    training = ["--recipe", point / "recipe.yaml", "--state", folder / "state"]
    run_stage(
        "train", "e2e/torchtune_logits.py", *training, "--tokens", TOKENS, "--output", folder / "tune.safetensors"
    )
    logits = load_file(folder / "hf.safetensors") | load_file(folder / "tune.safetensors")
    for path in ("peft", "transformers", "torchtune", "base"):
        distance = np.abs(logits[path] - logits["merged"]).max()
        print(f"largest distance of logits, merged and {path}: {distance:.2e}")


if __name__ == "__main__":
    main()
