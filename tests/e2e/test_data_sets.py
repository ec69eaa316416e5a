"""Points with data of their own: two sets, and two sizes of one."""

import json
from collections.abc import Callable
from itertools import pairwise
from string import ascii_lowercase

import pandas as pd
import pytest

from lorasweep.trainers.training_log import read_log
from lorasweep.util.digest import digest_file
from sweep import SUMMED_UP, Sweep

pytestmark = pytest.mark.long  # tests/unit says what each point has; this is that it is used

FEW, ALL, BACK = (
    "data=forward__max_samples=5",
    "data=forward__max_samples=null",
    "data=backward__max_samples=null",
)


@pytest.fixture(scope="module")
def sweep(make: Callable[..., Sweep]) -> Sweep:
    sweep = make("sets", variables={"data": ["forward", "backward"], "max_samples": [5, None]})
    samples = [{"input": f"after {b}", "output": a} for a, b in pairwise(ascii_lowercase)]
    (sweep.directory / "backward.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    sweep.config["data"] = {"sets": {"forward": {"train": "train.jsonl"}, "backward": {"train": "backward.jsonl"}}}
    sweep.edit(
        exclude=["data == 'backward' and max_samples == 5"],
        controls={"lora_alpha": "${lora_rank}"},
        evaluation={"merge_adapters": False},
        plan={"count": True},
    )
    evaluations = {"evaluate": 1, "evaluate_adapters": 1, "publish": 3}
    trainings = {"configure": 3, "train": 3, "take": 3}
    assert sweep.plan() == {**trainings, **evaluations, "cleanup": 4, **SUMMED_UP}
    sweep.run()
    assert sweep.plan() == {}
    return sweep


def test_each_is_trained_on_its_own_samples_and_answers_so(sweep: Sweep) -> None:
    table = pd.read_csv(sweep.results / "results.csv", na_values=[""], keep_default_na=False).set_index("point")
    assert {name: table.loc[name, "data"] for name in (FEW, ALL, BACK)} == {
        FEW: "forward",
        ALL: "forward",
        BACK: "backward",
    }
    assert table.loc[FEW, "max_samples"] == 5
    assert pd.isna(table.loc[ALL, "max_samples"])
    # 5 samples a step, 40 epochs.
    assert {name: table.loc[name, "steps"] for name in (FEW, ALL, BACK)} == {FEW: 40, ALL: 200, BACK: 200}
    assert {name: len(read_log(sweep.results / name / "adapter/training_log.csv")) for name in (FEW, ALL)} == {
        FEW: 40,
        ALL: 200,
    }
    digests = {name: digest_file(sweep.directory / name) for name in ("train.jsonl", "backward.jsonl")}
    for name, file in ((FEW, "train.jsonl"), (ALL, "train.jsonl"), (BACK, "backward.jsonl")):
        assert digests[file] in table.loc[name, "data_sha256"]
        manifest = json.loads((sweep.results / name / "manifest.json").read_text())
        assert manifest["settings"]["data"] == table.loc[name, "data"]
        assert manifest["settings"]["lora_alpha"] == manifest["settings"]["lora_rank"]
    assert table.loc[ALL, "match/accuracy"] == 1
    assert table.loc[BACK, "match/accuracy"] == 0
    assert len(set(table.loc[[FEW, ALL, BACK], "evaluation_sha256"])) == 1
    assert "match their manifests and the experiment" in sweep.call("verify")
    page = (sweep.results / "report.html").read_text()
    assert all(said in page for said in ("${lora_rank}", "{forward: {train: train.jsonl}, backward:"))


def test_the_plan_counts_each(sweep: Sweep) -> None:
    sweep.call("plan", "--cores", "2")
    plan = json.loads((sweep.results / "plan.json").read_text())
    table = pd.read_csv(sweep.results / "results.csv").set_index("point")
    assert plan["tokens_are_counted"] is True
    for point in plan["points"]:
        if point["mode"] != "base":
            assert point["steps"] == table.loc[point["name"], "steps"]
            # What the plan says is the mean of all samples; the batches that are trained on are drawn.
            assert point["tokens"] == pytest.approx(table.loc[point["name"], "tokens"], rel=0.02)
    # The samples of both sizes are counted once.
    assert len(json.loads((sweep.results / "lengths.json").read_text())["counts"]) == 2


def test_an_edit_of_one_set_trains_its_points_alone(sweep: Sweep) -> None:
    def read_digests() -> dict[str, str]:
        return {name: digest_file(sweep.results / name / "adapter/adapter_model.safetensors") for name in (FEW, ALL)}

    before = read_digests()
    times = {name: (sweep.results / name / "manifest.json").stat().st_mtime_ns for name in (FEW, ALL, "baseline")}
    sets = sweep.config["data"]["sets"]
    sweep.edit(data={"sets": {**sets, "backward": {**sets["backward"], "train_on_input": True}}})
    one = dict.fromkeys(("configure", "train", "take", "evaluate_adapters", "publish", "cleanup"), 1)
    assert sweep.plan() == {**one, **SUMMED_UP}
    assert f"{BACK}: take: train_on_input was false, is true" in sweep.run("--dry-run")
    sweep.run()
    assert sweep.plan() == {}
    assert read_digests() == before
    assert times == {name: (sweep.results / name / "manifest.json").stat().st_mtime_ns for name in times}
