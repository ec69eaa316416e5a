"""The three modes on SmolLM2-135M: are their completions the same, and how far apart are their logits?

    make demo && .venv/driver/bin/python benchmarks/parity.py

One training of the demo in each mode (fp32, greedy), then every way to apply the adapter: merged into a full model (A),
by PEFT, by transformers from the adapter's folder, and by torchtune itself, which trains the same recipe once more.
The trained adapter is also evaluated in the three modes in bf16 and fp16.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

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
        compare_completions("fp32", RESULTS, POINTS)
        for dtype in ("bf16", "fp16"):
            name = f"{NAME}_{dtype}"
            configfile.write_text(yaml.safe_dump(make_given(experiment, name, dtype), sort_keys=False))
            subprocess.run([*command, "--quiet", "all"], cwd=ROOT, check=True)
            compare_completions(dtype, RESULTS.with_name(name), {mode: mode for mode in POINTS})


def make_given(experiment: dict[str, Any], name: str, dtype: str) -> dict[str, Any]:
    """Return an experiment that evaluates the trained adapter in each mode, in another precision."""
    adapter = str(RESULTS / POINTS["A"] / "adapter")
    modes = {
        "A": {"model_format": "hf"},
        "B1": {"model_format": "adapter", "merge_adapters": True},
        "B2": {"model_format": "adapter", "merge_adapters": False},
    }
    return {
        "experiment": {"name": name, "question": f"Do the modes agree in {dtype}?"},
        "model": experiment["model"] | {"dtype": dtype},
        "runs": [{"name": mode, "adapter": adapter, **keys} for mode, keys in modes.items()],
        "evaluation": experiment["evaluation"],
    }


def compare_completions(dtype: str, results: Path, points: dict[str, str]) -> None:
    logs = {mode: ROOT / results / point / "eval/capitalisation.eval" for mode, point in points.items()}
    logs["base"] = ROOT / results / "baseline/eval/capitalisation.eval"
    read = json.loads(run_stage("eval", "e2e/read_logs.py", *logs.values()))
    completions = {mode: read[str(log)]["completions"] for mode, log in logs.items()}
    for mode in ("B1", "B2", "base"):
        equal = sum(completions[mode][sample] == text for sample, text in completions["A"].items())
        print(f"{dtype}: completions of A and {mode}: {equal} of {len(completions['A'])} equal")


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
