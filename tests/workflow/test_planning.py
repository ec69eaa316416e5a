"""What a plan says, without running a job: the same jobs as Snakemake's, from headers or from a configuration alone."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from sweep import SUMMED_UP, Sweep

COUNTED: dict[str, bytes] = {}
"""What the first plan looked at and counted, of the data, tasks and recipes that most sweeps here have."""


def read_plan(sweep: Sweep, *arguments: str) -> dict[str, Any]:
    """Plan a sweep; what was counted before of the same data and tasks is taken over."""
    sweep.results.mkdir(parents=True, exist_ok=True)
    for name, content in COUNTED.items():
        if not (sweep.results / name).exists():
            (sweep.results / name).write_bytes(content)
    said = sweep.call("plan", "--cores", "2", *arguments)
    assert "plan.json" in said
    for name in ("lengths.json", "task_sizes.json", "recipes.json"):
        if (sweep.results / name).exists():
            COUNTED.setdefault(name, (sweep.results / name).read_bytes())
    return dict(json.loads((sweep.results / "plan.json").read_text()))


MODES = {
    "A": {"model_format": "hf"},
    "B1": {"model_format": "adapter", "merge_adapters": True},
    "B2": {"model_format": "adapter", "merge_adapters": False},
}


def mode_is(quick: str) -> pytest.MarkDecorator:
    """A test of each mode; of one of them for every commit."""
    modes = [mode if mode == quick else pytest.param(mode, marks=pytest.mark.long) for mode in MODES]
    return pytest.mark.parametrize("mode", modes)


@mode_is("B2")
def test_the_plan_has_snakemakes_own_jobs_and_the_other_modes_beside_them(
    make: Callable[..., Sweep], mode: str
) -> None:
    sweep = make(plan={"parallel_jobs": 2})
    sweep.edit(evaluation=MODES[mode])
    jobs = sweep.plan()
    plan = read_plan(sweep)
    assert plan["to_do"]["jobs"] == plan["whole"]["jobs"] == plan[mode]["jobs"] == jobs
    assert plan["A"]["kept_bytes"] > plan["B1"]["kept_bytes"] == plan["B2"]["kept_bytes"]
    assert plan["B1"]["temporary_bytes"] >= plan["B2"]["temporary_bytes"]
    assert {point["name"]: point["is_done"] for point in plan["points"]} == {
        "baseline": False,
        "lora_rank=4": False,
        "lora_rank=8": False,
    }
    # The model has no tokenizer that could count.
    assert plan["tokens_are_counted"] is False
    assert json.loads((sweep.results / "task_sizes.json").read_text())["tasks"]["letters"]["samples"] == 6
    assert (sweep.results / "plan.svg").read_text().count("<svg") == 1
    assert not list(sweep.results.glob("trainings/*/recipe.yaml"))


def test_a_dry_run_ends_with_the_plan_in_short_and_writes_nothing(make: Callable[..., Sweep]) -> None:
    sweep = make()
    said = sweep.run("--dry-run")
    assert "Plan: 0 of 3 points done. To do: " in said
    assert "Times of train, evaluate are guessed" in said
    assert re.search(r"The whole sweep keeps: A [\d.]+ [kMG]B, B1 [\d.]+ [kMG]B \+ [\d.]+ [kMG]B at the peak", said)
    assert not sweep.results.exists()


@mode_is("B1")
def test_a_configuration_alone_is_enough_for_a_plan_and_not_for_a_run(make: Callable[..., Sweep], mode: str) -> None:
    sweep = make()
    sweep.edit(evaluation=MODES[mode])
    whole = read_plan(sweep)
    for file in (sweep.directory / "model").glob("*.safetensors*"):
        file.unlink()
    (sweep.directory / "model/.cache").mkdir()
    alone = read_plan(sweep)
    assert alone["to_do"]["jobs"] == whole["to_do"]["jobs"]
    for mode in MODES:
        # Less the index of the shards, which are not known.
        assert whole[mode]["kept_bytes"] == pytest.approx(alone[mode]["kept_bytes"], abs=20_000)
    refused = sweep.snakemake()
    assert refused.returncode == 1
    assert "has a config.json but no weights, which is enough for a plan" in refused.stdout + refused.stderr


def test_a_run_without_room_is_refused_unless_it_is_forced(make: Callable[..., Sweep]) -> None:
    sweep = make(plan={"storage_limit_gb": 0.0002, "parallel_jobs": 2, "count": False})
    sweep.edit(evaluation={"baseline": False, "enabled": True})
    assert "A run would be refused: not enough disk space" in sweep.run("--dry-run")
    refused = sweep.snakemake()
    said = refused.stdout + refused.stderr
    assert refused.returncode == 1
    assert "are free (plan.storage_limit_gb: 0.0002); what would fit: no mode of this sweep" in said
    assert not list(sweep.results.glob("trainings/*/recipe.yaml"))
    # The model has no tokenizer that could train: so far, and no further.
    forced = sweep.snakemake("--config", "force_plan=true")
    assert "not enough disk space" in forced.stdout + forced.stderr
    assert "0 of 2 points done, 2 failed" in forced.stdout + forced.stderr
    assert len(list(sweep.results.glob("trainings/*/recipe.yaml"))) == 2


@pytest.mark.long  # tests/unit says so of the plan's sums
def test_a_sweep_that_is_not_evaluated_is_planned_too(make: Callable[..., Sweep]) -> None:
    sweep = make()
    sweep.edit(evaluation={"enabled": False, "tasks": [], "merge_adapters": False})
    assert (
        read_plan(sweep)["to_do"]["jobs"]
        == sweep.plan()
        == {"configure": 2, "train": 2, "take": 2, "cleanup": 2, **SUMMED_UP}
    )


@pytest.mark.long  # tests/eval says so of what a task's options give
def test_a_tasks_own_options_are_counted(make: Callable[..., Sweep]) -> None:
    sweep = make()
    options = {"limit": 4, "epochs": 5, "max_tokens": 3, "solver": "chain_of_thought", "scorer": "match"}
    sweep.edit(evaluation={"tasks": [{"task": "tasks.py@letters", **options}]}, plan={"count": True})
    plan = read_plan(sweep)
    sizes = json.loads((sweep.results / "task_sizes.json").read_text())["tasks"]
    assert sizes["letters"]["samples"] == 20
    sweep.edit(evaluation={"tasks": [{"task": "tasks.py@letters", **options, "max_tokens": 300}]})
    assert read_plan(sweep)["whole"]["job_hours"]["evaluate"] > plan["whole"]["job_hours"]["evaluate"]


OWN = """
from inspect_ai.solver import system_message


@task
def own() -> Task:
    return Task(dataset=[Sample(input="a")], solver=[system_message("Be brief."), generate()], scorer=match())
"""


@pytest.mark.long  # tests/eval says so of the task
def test_a_task_with_a_system_message_of_its_own_is_refused_before_any_job(make: Callable[..., Sweep]) -> None:
    sweep = make(plan={"count": True})
    (sweep.directory / "tasks.py").write_text((sweep.directory / "tasks.py").read_text() + OWN)
    sweep.edit(evaluation={"tasks": ["tasks.py@letters", "tasks.py@own"]})
    refusal = "sweep.yaml: evaluation.tasks: 'own' brings a system message of its own (its solver)"
    said = sweep.call("plan")
    assert "A run would be refused: " in said
    assert refusal in said
    refused = sweep.snakemake()
    assert refused.returncode == 1
    assert refusal in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(sweep.results.glob("trainings/*/recipe.yaml"))
    for named in ("", "Tell."):
        sweep.edit(evaluation={"tasks": ["tasks.py@letters", {"task": "tasks.py@own", "system_prompt": named}]})
        assert "a system message of its own" not in sweep.call("plan")


@pytest.mark.long  # test_prompts.py says so of the prompts
def test_a_model_without_a_chat_template_is_said_to_be_asked_by_role(make: Callable[..., Sweep]) -> None:
    sweep = make()
    (sweep.directory / "model/tokenizer_config.json").write_text("{}")
    said = sweep.run("--dry-run")
    assert "model: the tokenizer has no chat template, so training and evaluation write a prompt as 'user: '" in said
    assert "data.format: completion" in said
    assert "no chat template" in sweep.call("plan")
    texts = [json.dumps({"text": f"{letter} and so on"}) for letter in "abcdefgh"]
    (sweep.directory / "train.jsonl").write_text("\n".join(texts))
    sweep.edit(data={"format": "completion"})
    assert "no chat template" not in sweep.run("--dry-run")


def test_a_date_without_quotes_is_read(make: Callable[..., Sweep]) -> None:
    sweep = make()
    (sweep.directory / "model/chat_template.jinja").write_text('{{ strftime_now("%d %b %Y") }}{{ messages }}')
    text = (sweep.directory / "sweep.yaml").read_text()
    (sweep.directory / "sweep.yaml").write_text(text.replace("data:\n", "data:\n  template_date: 2025-01-31\n"))
    sweep.run("configure_all")
    assert "template_date: '2025-01-31'\n" in (sweep.find_training("lora_rank=4") / "recipe.yaml").read_text()


def test_nothing_of_the_plans_settings_reruns_anything(make: Callable[..., Sweep]) -> None:
    sweep = make()
    sweep.run("configure_all")
    before = sweep.plan()
    sweep.edit(plan={"device": "cpu", "efficiency": 0.5, "parallel_jobs": 7})
    assert sweep.plan() == before
    sweep.edit(plan={"device": "h10"})
    refused = sweep.snakemake("--dry-run")
    assert refused.returncode == 1
    assert "plan.device: 'h10' is not known (did you mean 'h100'?)" in refused.stdout + refused.stderr
