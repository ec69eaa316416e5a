"""What a finished sweep runs again after a change: what depends on it, and nothing else."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lorasweep.trainers.training_log import read_log
from sweep import MODES, POINTS, ROOT, SUMMED_UP, Sweep, wait_until

ALL_OF_EVERY_POINT = {
    # The three modes share a training.
    "configure": 1,
    "train": 1,
    "take": 3,
    "export": 1,
    "merge": 1,
    "evaluate": 2,
    "evaluate_adapters": 1,
    "publish": 1,
    "cleanup": 3,
    **SUMMED_UP,
}
ALL_EVALUATIONS = {
    "merge": 1,
    "evaluate": 3,
    "evaluate_adapters": 1,
    "publish": 1,
    "cleanup": 4,
    **SUMMED_UP,
}


@pytest.fixture
def sweep(finished: Sweep, tmp_path: Path) -> Sweep:
    """The finished sweep, free to be changed; what its plan would count anew is not counted."""
    sweep = finished.copy(tmp_path)
    sweep.edit(plan={"count": False})
    return sweep


def edit(**sections: Any) -> Callable[[Sweep], None]:
    return lambda sweep: sweep.edit(**sections)


def delete(path: str) -> Callable[[Sweep], None]:
    def change(sweep: Sweep) -> None:
        target = sweep.results / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def append(name: str, text: str) -> Callable[[Sweep], None]:
    def change(sweep: Sweep) -> None:
        with (sweep.directory / name).open("a") as file:
            file.write(text)

    return change


def touch(sweep: Sweep) -> None:
    inputs = [file for file in sweep.directory.rglob("*") if file.is_file() and ".snakemake" not in file.parts]
    for file in inputs:
        os.utime(file)


def touch_inputs_before_outputs(sweep: Sweep) -> None:
    for name in ("train.jsonl", "tasks.py", "model/config.json", "model/model.safetensors", "sweep.yaml"):
        os.utime(sweep.directory / name)
    for point in POINTS.values():
        os.utime(sweep.results / point / "recipe.yaml")
        os.utime(sweep.results / point / "adapter/adapter_model.safetensors")


def reorder(sweep: Sweep) -> None:
    def backwards(value: Any) -> Any:
        return {key: backwards(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    sweep.config = backwards(sweep.config)
    sweep.config["variables"] = {key: values[::-1] for key, values in sweep.config["variables"].items()}
    sweep.write()
    text = (sweep.directory / "sweep.yaml").read_text()
    (sweep.directory / "sweep.yaml").write_text(f"# a comment\n{text}\n# and another\n")


def vary(**variables: list[Any]) -> Callable[[Sweep], None]:
    return edit(variables={**MODES["variables"], **variables})


SOME = {"task": "tasks.py@letters", "name": "some"}

CHANGES: dict[str, tuple[Callable[[Sweep], Any], dict[str, int]]] = {
    "nothing": (lambda sweep: None, {}),
    "everything touched": (touch, {}),
    "inputs touched": (touch_inputs_before_outputs, {}),
    "the file reordered and commented": (reorder, {}),
    "a value added": (
        vary(lora_rank=[4, 8]),
        ALL_OF_EVERY_POINT,  # of the three new points
    ),
    "a variable of one value added": (vary(lora_rank=[8]), {"collect": 1, "report": 1}),
    "evaluation edited": (edit(evaluation={"max_tokens": 7}), ALL_EVALUATIONS),
    "a task's arguments edited": (
        edit(evaluation={"tasks": [{"task": "tasks.py@letters", "args": {"size": 3}}]}),
        ALL_EVALUATIONS,
    ),
    "a task's own temperature edited": (
        edit(evaluation={"tasks": [{"task": "tasks.py@letters", "temperature": 0.5}]}),
        ALL_EVALUATIONS,
    ),
    "a judge added": (edit(evaluation={"model_roles": {"grader": "hf/model"}}), ALL_EVALUATIONS),
    "a baseline added": (
        edit(evaluation={"baselines": [{"name": "again", "model": "model"}]}),
        {"evaluate": 1, "cleanup": 1, **SUMMED_UP},
    ),
    "the modes said at length": (
        edit(
            variables={"model_format": ["hf", "adapter", "adapter"], "merge_adapters": [True, True, False]},
            zip=[["model_format", "merge_adapters"]],
        ),
        {"report": 1},  # which shows the file
    ),
    "what is left out said as a condition": (
        edit(
            variables={"model_format": ["hf", "adapter"], "merge_adapters": [True, False]},
            exclude=["model_format == 'hf' and not merge_adapters"],
        ),
        {"report": 1},
    ),
    "the task file edited": (append("tasks.py", "\n# another scorer\n"), ALL_EVALUATIONS),
    "lr edited": (edit(controls={"lr": 5e-3}), ALL_OF_EVERY_POINT),
    "training data edited": (append("train.jsonl", '{"input": "after z", "output": "a"}\n'), ALL_OF_EVERY_POINT),
    "the question edited": (edit(experiment={"question": "why?"}), {"report": 1}),
    "what the report answers with edited": (edit(report={"confidence": 0.9}), {"collect": 1, "report": 1}),
    "the report deleted": (delete("report.html"), {"report": 1}),
    "a log deleted (B1)": (
        delete(f"{POINTS['B1']}/eval/letters.eval"),
        {"merge": 1, "evaluate": 1, "cleanup": 1, **SUMMED_UP},
    ),
    "a log deleted (B2)": (
        delete(f"{POINTS['B2']}/eval/letters.eval"),
        {"evaluate_adapters": 1, "publish": 1, "cleanup": 1, **SUMMED_UP},
    ),
    "an adapter deleted": (
        delete(f"{POINTS['B2']}/adapter"),
        {"take": 1, "evaluate_adapters": 1, "publish": 1, "cleanup": 1, **SUMMED_UP},
    ),
    "a full model deleted": (
        delete(f"{POINTS['A']}/hf_model"),
        {"export": 1, "evaluate": 1, "cleanup": 1, **SUMMED_UP},
    ),
    "the pages that evaluate again edited, as by another version": (
        lambda sweep: [page.write_text("# another page\n") for page in sweep.results.glob("*/eval/reproduce.py")],
        {},
    ),
    "a page that evaluates again deleted": (delete(f"{POINTS['B1']}/eval/reproduce.py"), {}),
    "a manifest deleted": (delete(f"{POINTS['A']}/manifest.json"), {"cleanup": 1, **SUMMED_UP}),
    "the table deleted": (delete("results.csv"), {"collect": 1, "report": 1}),
    "a point left out": (
        edit(variables={"mode": ["A", "B1"]}),
        SUMMED_UP,
    ),
    "a task added for some points": (
        edit(evaluation={"tasks": ["tasks.py@letters", {**SOME, "when": "mode == 'B2'"}]}),
        {"evaluate": 1, "evaluate_adapters": 1, "publish": 1, "cleanup": 2, **SUMMED_UP},
    ),
    "a condition that all points satisfy": (
        edit(evaluation={"tasks": [{"task": "tasks.py@letters", "when": "lora_rank > 1"}]}),
        {"report": 1},
    ),
    "a condition that one point satisfies": (
        edit(evaluation={"tasks": [{"task": "tasks.py@letters", "when": "mode == 'A'"}]}),
        {"cleanup": 2, **SUMMED_UP},
    ),
    "evaluation turned off": (edit(evaluation={"enabled": False}), {"cleanup": 3, **SUMMED_UP}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_reruns_what_depends_on_it_and_only_that(sweep: Sweep, change: str) -> None:
    make_change, expected = CHANGES[change]
    make_change(sweep)
    assert sweep.plan() == expected


def test_other_code_of_ours_reruns_nothing(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> None:
    clone = tmp_path_factory.mktemp("clone")
    for name in ("Snakefile", "profiles", "scripts", "workflow"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, clone / name)
    changed = [file for folder in ("scripts", "workflow/lorasweep") for file in (clone / folder).rglob("*.*")]
    for file in [*changed, clone / "scripts/run", clone / "workflow/report/report.html.jinja"]:
        if file.suffix != ".pyc":
            file.write_text(file.read_text(encoding="utf-8") + "\n# another comment\n", encoding="utf-8")
    # In a process that has not imported ours.
    sweep.program = ("-P", "-m", "snakemake")
    assert sweep.plan("--snakefile", clone / "Snakefile") == {}


def test_a_lost_training_is_missed_by_nobody_who_took_it(sweep: Sweep) -> None:
    shutil.rmtree(sweep.results / "trainings")
    assert sweep.plan() == {}


@pytest.mark.parametrize("mode", ["A", "B1", "B2"])
def test_a_mode_more_or_less_trains_nothing_and_concerns_no_other(sweep: Sweep, mode: str) -> None:
    others = [other for other in ("A", "B1", "B2") if other != mode]
    sweep.edit(variables={"mode": others})
    assert not {"configure", "train", "take"} & sweep.plan().keys()
    shutil.rmtree(sweep.results / POINTS[mode])
    sweep.edit(variables={"mode": [*others, mode]})
    evaluation = {"A": ("export", "evaluate"), "B1": ("merge", "evaluate"), "B2": ("evaluate_adapters", "publish")}[
        mode
    ]
    assert sweep.plan() == {**dict.fromkeys(("take", *evaluation, "cleanup"), 1), **SUMMED_UP}
    sweep.run("--until", "take")
    assert sweep.plan() == {**dict.fromkeys((*evaluation, "cleanup"), 1), **SUMMED_UP}


def test_points_of_one_training_have_an_adapter_each_and_its_time_is_counted_once(finished: Sweep) -> None:
    [training] = (finished.results / "trainings").iterdir()
    assert {path.name for path in training.iterdir()} == {"recipe.yaml", "adapter"}
    files = [finished.results / point / "adapter/adapter_model.safetensors" for point in POINTS.values()]
    assert len({file.stat().st_ino for file in files}) == 3
    # As two that take at once may both have a copy.
    assert (training / "adapter" / files[0].name).stat().st_nlink <= 2
    manifests = [json.loads((finished.results / point / "manifest.json").read_text()) for point in POINTS.values()]
    assert ["train" in manifest["seconds"] for manifest in manifests] == [True, False, False]
    assert len({manifest["adapter_sha256"] for manifest in manifests}) == 1


def test_a_new_base_model_reruns_everything(sweep: Sweep, other_model: Path) -> None:
    shutil.rmtree(sweep.directory / "model")
    shutil.copytree(other_model, sweep.directory / "model")
    assert sweep.plan() == {**ALL_OF_EVERY_POINT, "evaluate": 3, "cleanup": 4}


def test_a_finished_sweep_has_nothing_to_do_on_slurm(sweep: Sweep) -> None:
    assert sweep.plan("--workflow-profile", str(ROOT / "profiles/slurm")) == {}


def test_a_changed_mode_makes_the_models_it_needs_and_trains_nothing(sweep: Sweep) -> None:
    sweep.edit(variables={"model_format": ["hf"]})
    assert "train" not in sweep.plan()


@pytest.mark.long  # that the table and the report alone are made anew is said by the plan
def test_added_points_and_variables_rename_no_old_point(sweep: Sweep) -> None:
    old = {path.name for path in sweep.results.iterdir()}
    vary(lora_rank=[8])(sweep)
    sweep.run()
    assert {path.name for path in sweep.results.iterdir()} == old
    assert sweep.plan() == {}


@pytest.fixture(scope="module")
def failed(make: Callable[..., Sweep]) -> Sweep:
    """A sweep in which one point fails in training, one in evaluation, and one ends well."""
    sweep = make("failing", variables={"lora_rank": [2, 4]}, runs=[{"name": "diverges", "lr": 1e30}])
    sweep.edit(controls={"epochs": 2}, evaluation={"tasks": [{"task": "tasks.py@letters", "limit": 1}]})
    sweep.environment["FAIL_EVALUATION_OF"] = "lora_rank=4"
    done = sweep.snakemake()
    assert done.returncode == 1
    sweep.environment.clear()
    return sweep


class TestFailures:
    def test_other_points_are_finished(self, failed: Sweep) -> None:
        assert (failed.results / "lora_rank=2/manifest.json").is_file()
        assert (failed.results / "baseline/manifest.json").is_file()

    def test_the_table_of_what_is_done_is_there_until_all_is_done(self, failed: Sweep) -> None:
        table = pd.read_csv(failed.results / "results-partial.csv")
        assert set(table["point"]) == {"baseline", "lora_rank=2"}
        assert not (failed.results / "results.csv").exists()
        page = (failed.results / "report-partial.html").read_text()
        assert "Not finished" in page
        assert "train of diverges" in page
        assert "told to fail" in page

    def test_the_logs_say_what_happened(self, failed: Sweep) -> None:
        assert "the training diverged" in failed.find_training_log("diverges").read_text()
        assert "told to fail" in (failed.results / "logs/evaluate/lora_rank=4.log").read_text()

    def test_nothing_half_made_is_kept(self, failed: Sweep) -> None:
        assert not (failed.results / "diverges").exists()
        assert not (failed.find_training("diverges") / "adapter").exists()
        assert [file.name for file in (failed.results / "lora_rank=4/eval").iterdir()] == ["reproduce.py"]
        assert not (failed.results / ".scratch").exists()
        assert not (failed.results / "lora_rank=4/manifest.json").exists()

    def test_each_failed_point_goes_on_from_where_it_failed(self, failed: Sweep) -> None:
        assert failed.plan() == {"train": 1, "take": 1, "merge": 2, "evaluate": 2, "cleanup": 2, **SUMMED_UP}

    def test_what_was_mended_is_run_and_the_rest_is_not(self, failed: Sweep, tmp_path: Path) -> None:
        sweep = failed.copy(tmp_path)
        sweep.edit(runs=[])
        before = (sweep.results / "lora_rank=2/manifest.json").stat().st_mtime_ns
        sweep.run()
        assert json.loads((sweep.results / "lora_rank=4/manifest.json").read_text())["mode"] == "B1"
        assert (sweep.results / "lora_rank=2/manifest.json").stat().st_mtime_ns == before
        assert not (sweep.results / ".scratch").exists()
        assert not list(sweep.results.glob("*-partial*"))
        assert "Not finished" not in (sweep.results / "report.html").read_text()
        assert set(pd.read_csv(sweep.results / "results.csv")["point"]) == {"baseline", "lora_rank=2", "lora_rank=4"}
        assert sweep.plan() == {}


def test_a_run_is_seen_while_it_goes_on_and_what_outlives_it_is_not_done_twice(
    make: Callable[..., Sweep], held_model: dict[str, Any]
) -> None:
    sweep = make("outlived", runs=[{"name": "point"}])
    sweep.edit(controls={"epochs": 1, "_override": {"model": held_model}}, evaluation={"enabled": False})
    go_on = sweep.directory / "go_on"
    sweep.environment |= {"PYTHONPATH": str(ROOT / "tests/e2e"), "LORASWEEP_AT_STEP": f"2:{go_on}"}
    with sweep.start() as run:
        wait_until(lambda: run.poll() is not None or list(sweep.results.glob("trainings/point-*/recipe.yaml")))
        running = sweep.find_training("point") / "state/train/training_log.csv"
        log = sweep.find_training_log("point")
        wait_until(lambda: run.poll() is not None or len(read_log(running)) == 2)
        assert run.poll() is None, sweep.read_said()
        # What a run says of itself is some seconds old.
        points = "Points: 1. waiting 0, training 1, trained 0, evaluating 0, done 0, failed 0."
        seen = ""

        def is_seen() -> bool:
            nonlocal seen
            seen = " ".join(sweep.call("status").split())
            return points in seen

        wait_until(lambda: is_seen() or run.poll() is not None)
        run.kill()
        run.wait()
        assert points in seen
        assert "outlived: running since" in seen
        assert re.search(r"\btrain point \d\d:\d\d ", seen)
        assert "Time left: " in seen
        assert "no run is going on. The last was killed" in " ".join(sweep.call("status").split())
        status = json.loads((sweep.results / "status.json").read_text())
        (job,) = status["running"]
        assert (job["rule"], job["name"], job["steps"]) == ("train", "point", 5)
        with sweep.start() as again:
            waits = "Waiting for a process of an earlier run"
            wait_until(lambda: again.poll() is not None or (log.is_file() and waits in log.read_text()))
            go_on.touch()
            assert again.wait() == 0, sweep.read_said()
    assert "ended before it was done; its lock is removed" in sweep.read_said()
    assert waits in log.read_text()
    assert "This recipe was trained by an earlier run" in log.read_text()
    assert not (sweep.find_training("point") / "state").exists()
    assert sweep.plan() == {}
