"""Training data that are too long, too few or cannot be tokenized cost no job, and the plan counts what is left."""

import json
from collections.abc import Callable

import pytest
import yaml

from lorasweep.trainers.training_log import read_log
from sweep import Sweep

FRAME = len("user\n\nassistant\n") + 3
"""Tokens of a prompt beside the question: a byte is a token."""


@pytest.fixture
def sweep(make: Callable[..., Sweep]) -> Sweep:
    """A sweep of one training on 25 samples of 33 tokens, and on two that are longer."""
    sweep = make("data", variables={"seed": [0]})
    with (sweep.directory / "train.jsonl").open("a") as file:
        file.write(json.dumps({"input": "after a", "output": "b" * 20}) + "\n")
        file.write(json.dumps({"input": "after " + "a" * 100, "output": "b"}) + "\n")
    sweep.edit(controls={"epochs": 1, "max_seq_len": 40}, evaluation={"enabled": False}, plan={"count": True})
    return sweep


def refuse(sweep: Sweep) -> str:
    done = sweep.snakemake()
    assert done.returncode == 1
    assert not list(sweep.results.glob("trainings/*"))
    return done.stdout + done.stderr


@pytest.mark.long  # tests/unit says so of the counts, tests/train of what is trained on
def test_samples_that_are_too_long_cost_no_job_and_are_dropped_or_cut_if_the_file_says_so(sweep: Sweep) -> None:
    assert "A run would be refused" not in sweep.run("--dry-run")  # nothing is counted yet
    said = refuse(sweep)
    lengths = f"train.jsonl:26 ({FRAME + 7 + 22}), train.jsonl:27 ({FRAME + 106 + 3})"
    assert f"data.train: 2 of 27 samples have more than max_seq_len = 40 tokens: {lengths}" in said
    assert "Expected: a larger max_seq_len, or data.too_long: truncate or drop" in said
    assert f"A run would be refused: {sweep.directory}/sweep.yaml: data.train: 2 of 27" in sweep.run("--dry-run")
    steps = {}
    for too_long in ("drop", "truncate"):
        sweep.edit(data={"too_long": too_long}, controls={"batch_size": 1})
        said = sweep.run("--until", "take")
        assert "Numbers of tokens" not in said
        assert "data.train: 2 of 27 samples have more than max_seq_len = 40 tokens" in said
        planned = sweep.call("plan", "--cores", "2")
        steps[too_long] = len(read_log(sweep.results / "seed=0/adapter/training_log.csv"))
        plan = json.loads((sweep.results / "plan.json").read_text())
        assert plan["tokens_are_counted"] is True
        assert plan["whole"]["steps"] == steps[too_long], planned
    # Of the last sample nothing is left to learn.
    assert steps == {"drop": 25, "truncate": 26}


def test_fewer_packs_than_a_batch_cost_no_job(sweep: Sweep) -> None:
    sweep.edit(controls={"packed": True, "max_seq_len": 2000})
    assert "batch_size: 5 with gradient_accumulation_steps: 1 (point 'seed=0') gives no optimizer step" in refuse(sweep)


def test_a_sample_at_which_the_template_fails_costs_no_job(sweep: Sweep) -> None:
    template = sweep.directory / "model/chat_template.jinja"
    template.write_text(
        "{% if 'after c' in messages[0]['content'] %}{{ raise_exception('no c here') }}{% endif %}"
        + template.read_text()
    )
    said = refuse(sweep)
    assert "train.jsonl:3: cannot be tokenized: model: the chat template refuses the messages (user): no c here" in said
    assert "no c here" in sweep.run("--dry-run")


def test_files_of_all_kinds_are_trained_on_in_order(make: Callable[..., Sweep]) -> None:
    sweep = make("kinds", variables={"seed": [0]})
    folder = sweep.directory
    (folder / "a.csv").write_text("\ufeffinstruction,input,output\nwhen?,,2024-01-01\n")
    (folder / "b.json").write_text(json.dumps([{"instruction": "when", "input": "it is?", "output": "2024-01-02"}]))
    (folder / "c.jsonl").write_text('{"instruction": "how many?", "output": "007"}\n' * 3)
    sweep.edit(
        data={"train": ["a.csv", "b.json", "c.jsonl"], "format": "alpaca"},
        controls={"epochs": 1, "batch_size": 5},
        evaluation={"enabled": False},
    )
    sweep.run("--until", "take")
    [row] = read_log(sweep.results / "seed=0/adapter/training_log.csv")
    texts = ["when?2024-01-01", "when\n\nit is?2024-01-02", *["how many?007"] * 3]
    assert row.tokens == sum(FRAME + len(text) + 2 for text in texts)
    record = json.loads((sweep.results / "seed=0/adapter/lorasweep.json").read_text())
    recipe = sweep.results / "seed=0/recipe.yaml"
    assert f"# training data sha256: {record['data_sha256']}\n" in recipe.read_text()
    assert len(record["data_sha256"].split()) == 3
    assert yaml.safe_load(recipe.read_text())["dataset"]["data_files"] == ["a.csv", "b.json", "c.jsonl"]
    assert sweep.plan("--until", "take") == {}
    with (folder / "b.json").open("a") as file:
        file.write("\n")
    assert sweep.plan("--until", "take")["train"] == 1
