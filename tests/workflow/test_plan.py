"""What a dry run says of sweeps that did not run yet: the jobs of each mode, and what the command line changes."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sweep import ROOT, SUMMED_UP, Sweep

PLANS = [
    ({"model_format": "hf"}, {"export": 2, "evaluate": 3}),
    ({"model_format": "adapter", "merge_adapters": True}, {"merge": 2, "evaluate": 3}),
    ({"model_format": "adapter", "merge_adapters": False}, {"evaluate_adapters": 1, "publish": 2, "evaluate": 1}),
]


@pytest.mark.parametrize(("mode", "jobs"), PLANS, ids=["A", "B1", "B2"])
def test_each_mode_has_its_jobs(make: Callable[..., Sweep], mode: dict[str, object], jobs: dict[str, int]) -> None:
    sweep = make()
    sweep.edit(evaluation=mode)
    shared = {"configure": 2, "train": 2, "take": 2, "cleanup": 3, **SUMMED_UP}
    assert sweep.plan() == shared | jobs


def test_zipped_variables_are_planned_together(make: Callable[..., Sweep]) -> None:
    variables = {"lora_rank": [4, 8], "lora_alpha": [8, 16], "seed": [0, 1]}
    sweep = make(variables=variables, zip=[["lora_rank", "lora_alpha"]])
    assert sweep.plan()["train"] == 4
    sweep.run("configure_all")
    recipes = {file.parent.name: file for file in sweep.results.glob("trainings/*/recipe.yaml")}
    named = {name.rpartition("-")[0]: yaml.safe_load(file.read_text()) for name, file in recipes.items()}
    assert {(name, recipe["model"]["lora_alpha"]) for name, recipe in named.items()} == {
        (f"lora_alpha={2 * rank}__lora_rank={rank}__seed={seed}", 2 * rank) for rank in (4, 8) for seed in (0, 1)
    }


def test_what_a_condition_is_true_of_is_not_planned(make: Callable[..., Sweep]) -> None:
    sweep = make(variables={"lora_rank": [4, 8], "lr": [1e-4, 1e-3]})
    sweep.edit(exclude=["lora_rank > 4 and lr >= 1e-3"])
    assert sweep.plan()["train"] == 3


def test_points_drawn_at_random_are_planned_and_more_of_them_keep_the_others(make: Callable[..., Sweep]) -> None:
    space = {"lr": {"log_uniform": [1e-5, 1e-3]}, "lora_rank": {"int_log_uniform": [4, 64]}}
    sweep = make(variables={}, sample={"points": 3, "seed": 7, "space": space})
    assert sweep.plan()["train"] == 3
    sweep.run("configure_all")
    before = {file.parent.name for file in sweep.results.glob("trainings/*/recipe.yaml")}
    sweep.edit(sample={"points": 5})
    assert sweep.plan("configure_all")["configure"] == 2
    sweep.run("configure_all")
    assert before < {file.parent.name for file in sweep.results.glob("trainings/*/recipe.yaml")}


def test_without_evaluation_points_are_trained_and_kept_only(make: Callable[..., Sweep]) -> None:
    sweep = make()
    sweep.edit(evaluation={"enabled": False})
    assert sweep.plan() == {"configure": 2, "train": 2, "take": 2, "cleanup": 2, **SUMMED_UP}


def test_a_task_for_some_points_is_planned_for_those_and_the_baseline(make: Callable[..., Sweep]) -> None:
    sweep = make()
    some = {"task": "tasks.py@letters", "name": "some", "when": "lora_rank == 8"}
    sweep.edit(evaluation={"tasks": ["tasks.py@letters", some], "merge_adapters": False})
    jobs = {"configure": 2, "train": 2, "take": 2, "cleanup": 3, **SUMMED_UP}
    assert sweep.plan() == {**jobs, "evaluate": 1, "evaluate_adapters": 2, "publish": 2}
    planned = sweep.run("--dry-run", "--printshellcmds")
    specs = dict(re.findall(r"job evaluate_adapters --spec '(.*?)' --points \S*?(lora_rank=\d)", planned))
    names = {point: [task["name"] for task in json.loads(spec)["tasks"]] for spec, point in specs.items()}
    assert names == {"lora_rank=4": ["letters"], "lora_rank=8": ["letters", "some"]}
    sweep.edit(evaluation={"tasks": [some]})
    assert sweep.plan() == {**jobs, "evaluate": 1, "evaluate_adapters": 1, "publish": 1}
    assert "Kept, but not evaluated, as no task is for them: lora_rank=4." in sweep.run("--dry-run")
    sweep.edit(evaluation={"tasks": [{**some, "when": "lora_rank == 16"}]})
    refused = sweep.snakemake("--dry-run")
    assert "evaluation.tasks.0: no point is evaluated on 'some'" in refused.stdout + refused.stderr


def test_without_baseline_the_base_model_is_not_evaluated(make: Callable[..., Sweep]) -> None:
    sweep = make()
    sweep.edit(evaluation={"baseline": False})
    assert sweep.plan()["evaluate"] == 2


@pytest.mark.long  # tests/e2e evaluates the base model so
def test_other_models_are_evaluated_as_they_are(make: Callable[..., Sweep]) -> None:
    sweep = make()
    before = sweep.plan()
    shutil.copytree(sweep.directory / "model", sweep.directory / "theirs")
    baselines = [{"name": "theirs", "model": "theirs"}, {"name": "again", "model": "model"}]
    sweep.edit(evaluation={"baselines": baselines})
    assert sweep.plan() == {**before, "evaluate": before["evaluate"] + 2, "cleanup": before["cleanup"] + 2}
    sweep.call("plan", "--cores", "2")
    plan = json.loads((sweep.results / "plan.json").read_text())
    assert plan["to_do"]["jobs"] == plan["whole"]["jobs"] == sweep.plan()
    assert {"theirs": "base", "again": "base"}.items() <= {p["name"]: p["mode"] for p in plan["points"]}.items()
    sweep.edit(variables={}, data={"train": None}, evaluation={"baseline": False, "baselines": baselines})
    assert sweep.plan() == {"evaluate": 2, "cleanup": 2, **SUMMED_UP}


def test_all_points_can_be_configured_alone(make: Callable[..., Sweep]) -> None:
    sweep = make()
    sweep.run("configure_all")
    names = sorted(file.parent.name for file in sweep.results.glob("trainings/*/recipe.yaml"))
    assert [name.rpartition("-")[0] for name in names] == ["lora_rank=4", "lora_rank=8"]
    assert "configure" not in sweep.plan()


def test_a_configfile_replaces_the_default_experiment(make: Callable[..., Sweep]) -> None:
    sweep = make()
    default = yaml.safe_load((ROOT / "config/experiment.yaml").read_text())
    said = sweep.run("--dry-run")
    assert default["experiment"]["name"] not in said
    assert "lora_rank=64" not in said


def test_single_keys_can_be_changed_on_the_command_line(make: Callable[..., Sweep]) -> None:
    sweep = make()
    assert not {"merge", "evaluate"} & sweep.plan("--config", "evaluation={enabled: false}").keys()
    assert sweep.plan("--config", "variables={lora_rank: [2, 4, 8]}")["train"] == 3


@pytest.mark.parametrize("arguments", [[], ["--profile", "slurm"]], ids=["as it is", "slurm"])
def test_a_fresh_clone_plans_its_default_experiment(tmp_path: Path, arguments: list[str]) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    command = [sys.executable, "-m", "snakemake", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^train +4$", done.stdout, flags=re.MULTILINE)
    if not arguments:
        rules = clone / "workflow/rules/results.smk"
        text = rules.read_text()
        rules.write_text(text + "\nraise WorkflowError('these rules are new')\n")
        again = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
        assert "these rules are new" in again.stdout + again.stderr
        rules.write_text(text)
    shutil.rmtree(clone / ".snakemake", ignore_errors=True)
    status = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert status.stdout == ""


def test_qwen3_by_qlora_is_planned_without_its_weights(tmp_path: Path) -> None:
    """Rank 8, 32 and 128 at two rates, on 36 layers: r · (q, o 8192 each, k, v 5120 each, MLP 3 · 16384)."""
    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("model*", "downloads"))
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", tmp_path]
    command += ["--configfile", ROOT / "config/qwen3_8b_qlora.yaml", "--dry-run"]
    unknown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.search(r"^train +6$", unknown.stdout, flags=re.MULTILINE), unknown.stderr
    assert "No plan: Qwen/Qwen3-8B/config.json is missing" in unknown.stdout + unknown.stderr
    shutil.copytree(ROOT / "tests/models/qwen3_8b", tmp_path / "Qwen/Qwen3-8B")
    known = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    values = 2 * (8 + 32 + 128) * 36 * (2 * 8192 + 2 * 5120 + 3 * 16384)
    kept = re.search(r"To do: ([\d.]+) GB kept", known.stdout + known.stderr)
    assert kept, known.stderr
    assert float(kept[1]) == pytest.approx(2 * values / 1e9, rel=0.01)


def test_a_sites_profile_lies_over_the_slurm_profile(
    make: Callable[..., Sweep], tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = tmp_path_factory.mktemp("site")
    text = "default-resources: {slurm_account: abc, slurm_partition: cpu, mem_mb: 4000, runtime: 60}\n"
    text += "set-resources:\n  train: {slurm_partition: gpu, gpu_model: a100, mem_mb: 64000}\n"
    (site / "config.yaml").write_text(text)
    said = make().run("--profile", ROOT / "slurm", "--workflow-profile", site, "--dry-run", "--verbose")
    resources = {
        rule: re.search(rf"rule {rule}:.*?resources: ([^\n]*)", said, flags=re.DOTALL)[1]
        for rule in ("train", "evaluate")
    }
    assert "slurm_account=abc, slurm_partition=gpu" in resources["train"]
    assert "gpu_model=a100" in resources["train"]
    assert "mem_mb=64000" in resources["train"]
    assert "slurm_account=abc, slurm_partition=cpu" in resources["evaluate"]


def test_a_sweep_of_a_machine_that_is_gone_is_unlocked_by_one_command(make: Callable[..., Sweep]) -> None:
    sweep = make()
    sweep.run("configure_all")
    record = {"host": "gone", "user": "somebody", "pid": 1, "started": 0.0}
    (sweep.results / ".controller.json").write_text(json.dumps(record))
    locks = sweep.directory / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    recipe = sweep.find_training("lora_rank=4") / "recipe.yaml"
    (locks / "0.output.lock").write_text(f"{recipe.relative_to(sweep.directory)}\n")
    (locks / "0.input.lock").write_text("")
    recipe.unlink()
    refused = sweep.snakemake("configure_all")
    assert refused.returncode == 1
    assert "is being run by somebody on gone (process 1, since" in refused.stderr
    assert not recipe.exists()
    sweep.run("--unlock")
    assert "is being run by" not in sweep.run("configure_all")
    assert recipe.exists()


def test_a_training_asks_for_its_gpus_on_one_node_and_on_a_cluster_no_other_job_does(
    make: Callable[..., Sweep],
) -> None:
    sweep = make(variables={"lora_rank": [4], "gpus": [2]})
    sweep.edit(model={"device": "cuda", "dtype": "bf16"})
    said = sweep.run("--profile", ROOT / "slurm", "--dry-run", "--verbose")
    resources = {
        rule: re.search(rf"rule {rule}:.*?resources: ([^\n]*)", said, flags=re.DOTALL)[1]
        for rule in ("train", "merge", "evaluate")
    }
    assert "gpu=2" in resources["train"]
    assert "nodes=1" in resources["train"]
    assert "gpu=1" in resources["evaluate"]
    assert "gpu=" not in resources["merge"]
    here = sweep.run("--cores", "16", "--resources", "gpu=2", "--dry-run", "--verbose")
    assert re.search(r"rule train:.*?threads: (\d+)", here, flags=re.DOTALL)[1] == "8"
    # Here a job at a time has the GPUs of the machine.
    assert re.search(r"rule evaluate:.*?gpu=(\d+)", here, flags=re.DOTALL)[1] == "2"
    shared = sweep.snakemake("--cores", "8", "--resources", "gpu=4", "--dry-run")
    assert shared.returncode == 1
    assert "--resources: gpu=4: jobs on one machine take its first GPUs" in shared.stdout + shared.stderr
    refused = sweep.snakemake("--cores", "8", "--resources", "gpu=1", "--dry-run")
    assert refused.returncode == 1
    assert "controls.gpus: 2 is invalid with --resources gpu=1. Expected: at most 1" in refused.stdout + refused.stderr


@pytest.mark.long  # tests/unit says so of the number
def test_an_evaluation_asks_for_its_gpus_on_one_node(make: Callable[..., Sweep]) -> None:
    sweep = make(variables={"mode": ["B1", "B2"]})
    sweep.edit(model={"device": "cuda", "dtype": "bf16"}, evaluation={"gpus": 2})
    said = sweep.run("--profile", ROOT / "slurm", "--dry-run", "--verbose", "--printshellcmds")
    for rule in ("evaluate", "evaluate_adapters"):
        job = re.search(rf"rule {rule}:.*?\n\n", said, flags=re.DOTALL)[0]
        assert {"gpu=2", "nodes=1", "model_gpus=2"} <= set(re.split(r"[,\s]+", job))
        assert "--gpus 2" in job
    assert "evaluations on up to 2 GPUs" in sweep.call("plan", "--cores", "2")
    refused = sweep.snakemake("--cores", "8", "--resources", "gpu=1", "--dry-run")
    assert refused.returncode == 1
    assert "evaluation.gpus: 2 is invalid with --resources gpu=1" in refused.stdout + refused.stderr


def test_without_weights_and_without_the_evaluation_environment_a_dry_run_says_why_it_has_no_plan(
    tmp_path: Path,
) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    shutil.copytree(ROOT / "tests/models/qwen3_8b", clone / "Qwen/Qwen3-8B")
    command = [sys.executable, "-m", "snakemake", "--configfile", "config/qwen3_8b_qlora.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
    assert re.search(r"^train +6$", done.stdout, flags=re.MULTILINE), done.stderr
    assert "No plan: Without weights it needs the evaluation environment: run 'make install'." in done.stdout
