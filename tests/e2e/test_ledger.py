"""The plan against what a real run leaves: bytes of weights to the byte, folders within a hundredth, jobs and hours."""

import csv
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.checkpoints.sizes import get_adapter_size, get_model_size
from lorasweep.experiment.sections import Controls
from lorasweep.planning.history import read_records
from lorasweep.running.ledger import read_runs
from lorasweep.running.storage_log import read_storage
from lorasweep.util.files import get_size
from sweep import POINTS, Sweep


@pytest.fixture(scope="module")
def plan(finished: Sweep) -> dict[str, Any]:
    finished.call("plan", "--cores", "2")
    return dict(json.loads((finished.results / "plan.json").read_text()))


def test_weights_are_planned_to_the_byte(finished: Sweep) -> None:
    base = read_checkpoint(finished.directory / "model")
    controls = Controls.model_validate(finished.config["controls"])
    for point in POINTS.values():
        weights = finished.results / point / "adapter/adapter_model.safetensors"
        assert weights.stat().st_size == get_adapter_size(base, controls, "fp32")
    full = finished.results / POINTS["A"] / "hf_model"
    assert sum(shard.stat().st_size for shard in full.glob("*.safetensors")) == get_model_size(base, "fp32")


def test_what_points_keep_is_planned_within_a_hundredth_but_for_small_records(
    finished: Sweep, plan: dict[str, Any]
) -> None:
    planned = {point["name"]: point["kept_bytes"] for point in plan["points"]}
    for name in [*POINTS.values(), "baseline"]:
        kept = json.loads((finished.results / name / "manifest.json").read_text())["bytes"]
        assert planned[name] == pytest.approx(kept, rel=0.01, abs=10_000)
    whole = sum(get_size(finished.results / name) for name in planned)
    assert plan["whole"]["kept_bytes"] == pytest.approx(whole, rel=0.01, abs=10_000 * len(planned))


def test_a_finished_sweep_has_nothing_to_do_and_was_learnt_from(finished: Sweep, plan: dict[str, Any]) -> None:
    assert plan["to_do"]["jobs"] == {}
    assert all(point["is_done"] for point in plan["points"])
    assert plan["tokens_are_counted"] is True
    assert {"train", "export", "merge", "evaluate", "evaluate_adapters"} <= plan["times_from"].keys()
    records = read_records(finished.results / "jobs.csv")
    # The corrected plan of the jobs that were done is what they took, as far as a median can say.
    for rule, found in plan["times_from"].items():
        mine = [record for record in records if record.rule == rule]
        assert min(r.seconds for r in mine) <= found["factor"] * mine[0].modelled_seconds * 1.001
        assert found["jobs"] == len(mine)
    steps = {point["name"]: point["steps"] for point in plan["points"]}
    trained = json.loads((finished.results / POINTS["A"] / "manifest.json").read_text())["training"]["steps"]
    assert steps[POINTS["A"]] == trained


def test_the_ledger_has_what_was_kept_and_spent(finished: Sweep) -> None:
    with (finished.results / "ledger.csv").open() as file:
        rows = {row["point"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*POINTS.values(), "baseline", "total"}
    for name in rows.keys() - {"total"}:
        manifest = json.loads((finished.results / name / "manifest.json").read_text())
        assert int(rows[name]["kept_bytes"]) == manifest["bytes"]
    attempts = {name: float(row["attempts"]) for name, row in rows.items()}
    # Trained, for all three, exported and evaluated; merged and evaluated; evaluated; and the baseline, evaluated.
    assert attempts == {POINTS["A"]: 3, POINTS["B1"]: 2, POINTS["B2"]: 1, "baseline": 1, "total": 7}
    records = read_records(finished.results / "jobs.csv")
    assert float(rows["total"]["job_seconds"]) == pytest.approx(sum(r.seconds for r in records), abs=0.1)
    assert float(rows["total"]["wall_seconds"]) > 0
    assert int(rows["total"]["peak_temporary_bytes"]) > 0
    assert float(rows["total"]["failed_attempts"]) == 0
    said = finished.call("ledger")
    assert "Kept: " in said
    assert "Wall time " in said
    assert POINTS["B2"] in said


def test_a_real_run_leaves_how_busy_its_cores_were_in_manifests_tables_and_report(finished: Sweep) -> None:
    rows = pd.read_csv(finished.results / "ledger.csv").set_index("point")
    table = pd.read_csv(finished.results / "results.csv").set_index("point")
    rules = {POINTS["A"]: {"train", "evaluate"}, POINTS["B1"]: {"evaluate"}, POINTS["B2"]: {"evaluate_adapters"}}
    for point, measured in rules.items():
        usage = json.loads((finished.results / point / "manifest.json").read_text())["usage"]
        assert usage.keys() == measured
        assert all(0 < record["cpu_busy"] < 4 and record["seconds"] > 1 for record in usage.values())
        assert not any("gpus" in record for record in usage.values())
        assert 0 < table.loc[point, "cpu_busy"] == rows.loc[point, "cpu_busy"]
    assert rows["gpu_busy"].isna().all()
    assert "How busy the cores were" in (finished.results / "report.html").read_text()


def test_what_was_measured_of_jobs_reruns_nothing(finished: Sweep, tmp_path: Path) -> None:
    sweep = finished.copy(tmp_path)
    files = list((sweep.results / "benchmarks").glob("*/*.json"))
    assert files
    for number, file in enumerate(files):
        if number % 2:
            file.unlink()
        else:
            file.write_text('{"seconds": 1')
    assert sweep.plan() == {}


def test_a_finished_run_leaves_its_last_status_and_its_storage_over_time(finished: Sweep) -> None:
    said = " ".join(finished.call("status").split())
    assert "no run is going on. The last ended" in said
    assert "with all its jobs done" in said
    assert "Points: 4. waiting 0, training 0, trained 0, evaluating 0, done 4, failed 0." in said
    samples = read_storage(finished.results / "storage.csv")
    kept = [json.loads(file.read_text())["bytes"] for file in finished.results.glob("*/manifest.json")]
    assert samples[-1].kept_bytes == sum(kept)
    peak = max(run.peak_temporary_bytes for run in read_runs(finished.results / "runs.json"))
    assert max(sample.temporary_bytes for sample in samples) == peak > 0
    assert not (finished.results / "failures.json").exists()


def test_an_edited_number_is_found_in_the_results_of_a_real_run(finished: Sweep, tmp_path: Path) -> None:
    assert "files match their manifests" in finished.call("verify")
    sweep = finished.copy(tmp_path)
    table = pd.read_csv(sweep.results / "results.csv", dtype=str)
    table.loc[table["point"] == POINTS["B1"], "match/accuracy"] = "0.12345"
    table.to_csv(sweep.results / "results.csv", index=False)
    done = sweep.lorasweep("verify")
    assert done.returncode == 1
    assert f"results.csv: {POINTS['B1']}, letters: match/accuracy is 0.12345, but the manifest says " in done.stdout
    assert "1 of " in done.stderr
