"""Tables, the answer, plots and the report say what the scores say, and no more."""

import html
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from lorasweep.layout import BASELINE
from lorasweep.results.answer import Answer, choose_metric, find_answer
from lorasweep.results.inference import EFFECTIVE_WILSON, PAIRED_WILSON, UNPAIRED, WILSON
from lorasweep.results.labels import GAP
from lorasweep.results.manifest import check_manifests
from lorasweep.results.plots import MOST_DOTS, MOST_MOMENTS, draw_losses, draw_metric, draw_storage
from lorasweep.results.replicates import aggregate
from lorasweep.results.report import make_report
from lorasweep.results.table import FACTS, SampleScores, is_metric, make_table, order_metrics, show_table
from lorasweep.results.usage import describe_usage
from lorasweep.stages import get_stages
from lorasweep.util.errors import InputError
from made_results import METRIC, TASK, collect, make_point, make_results

RANKS = {"lora_rank": [4, 8, 16]}
RISING = {4: 0.4, 8: 0.6, 16: 0.95}


def by_rank(chances: Mapping[int, float]) -> Any:
    return lambda settings: chances[settings["lora_rank"]]


def tabulate(results: Path, variables: Sequence[str], samples: pd.DataFrame | None) -> pd.DataFrame:
    names = [name for name, entry in json.loads((results / "points.json").read_text()).items() if entry["current"]]
    base = [BASELINE] if (results / BASELINE).is_dir() else []
    return make_table(results, [*base, *names], variables, SampleScores(samples), 0.95)


def answer(results: Path, variables: Sequence[str], samples: pd.DataFrame, **changes: Any) -> Answer:
    table = tabulate(results, variables, samples)
    scores = SampleScores(samples)
    settings = aggregate(table, variables, scores, 0.95)
    asked = {"task": TASK, "metric": METRIC, "higher_is_better": True, "confidence": 0.95} | changes
    return find_answer(table, settings, scores, variables, **asked)


def test_a_row_says_how_sure_it_is_and_how_far_over_the_base(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    table = tabulate(tmp_path, ["lora_rank"], samples).set_index("point")
    row, base = table.loc["lora_rank=16"], table.loc[BASELINE]
    own = samples[samples["point"] == "lora_rank=16"].set_index("sample")["value"]
    other = samples[samples["point"] == BASELINE].set_index("sample")["value"]
    assert row[METRIC] == own.mean()
    assert row[f"{METRIC}:low"] < row[METRIC] < row[f"{METRIC}:high"]
    assert row[f"{METRIC}:interval"] == base[f"{METRIC}:interval"] == WILSON
    assert row[f"{METRIC}:delta"] == pytest.approx(own.mean() - other.mean())
    assert row[f"{METRIC}:delta_interval"] == PAIRED_WILSON
    assert row[f"{METRIC}:pairs"] == 40
    assert row[f"{METRIC}:p"] <= row[f"{METRIC}:p_adjusted"] < 0.05
    assert pd.isna(base[f"{METRIC}:delta"])
    assert row["final_train_loss"] == pytest.approx(3 / np.sqrt(20))
    assert list(table.columns[:4]) == ["setting", "trained_setting", "lora_rank", "epoch"]
    assert list(table.columns[4:8]) == ["seed", "mode", "task", "samples"]
    facts = [f"{METRIC}:{fact}" for fact in ("stderr", "low", "high", "interval")]
    assert list(table.columns[8:13]) == [METRIC, *facts]


def test_answers_without_a_score_are_told_wherever_the_score_is(tmp_path: Path) -> None:
    samples = make_results(tmp_path, {"lora_rank": [8], "seed": [0, 1]}, lambda settings: 0.5)
    point = "lora_rank=8__seed=0"
    unread = samples["sample"].isin(["s0", "s1", "s2"]) & (samples["point"] == point)
    samples = samples[~unread]
    manifest = json.loads((tmp_path / point / "manifest.json").read_text())
    own = samples[samples["point"] == point]["value"]
    manifest["evaluation"]["tasks"][TASK]["scores"] = {METRIC: own.mean(), "match[mode]/accuracy": 1.0}
    (tmp_path / point / "manifest.json").write_text(json.dumps(manifest))
    samples.to_parquet(tmp_path / "samples.parquet", index=False)
    collect(tmp_path, ["lora_rank", "seed"])
    table = pd.read_csv(tmp_path / "results.csv").set_index("point")
    for metric in (METRIC, "match[mode]/accuracy"):
        assert table[f"{metric}:unscored"].dropna().to_dict() == {point: 3}
    assert table.loc[point, "samples"] == 40
    replicates = pd.read_csv(tmp_path / "replicates.csv").set_index("setting")
    assert replicates[f"{METRIC}:unscored"].dropna().to_dict() == {"lora_rank=8": 3}
    note = f"3 of 120 answers on {TASK} have no score"
    assert any(caveat.startswith(note) for caveat in json.loads((tmp_path / "answer.json").read_text())["caveats"])
    console = Console(width=200, record=True)
    show_table(table.reset_index(), "mine", console)
    assert "37 of 40" in console.export_text()
    page = report(tmp_path, ["lora_rank", "seed"])
    assert note in page
    assert "37 of 40" in page


def edit_manifest(point: Path, **changes: Any) -> None:
    file = point / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_row_has_the_versions_and_revisions_of_the_training_and_of_the_evaluation(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    training = {"versions": {"python": "3.11", "torch": "2.5.1"}, "git_revision": "b"}
    evaluation = {"versions": {"python": "3.11", "torch": "2.13.0", "vllm": "1"}, "git_revision": "a"}
    edit_manifest(tmp_path / "lora_rank=16", training=training, evaluation=evaluation, git_revision="c")
    edit_manifest(tmp_path / "lora_rank=8", training=training, evaluation=evaluation | {"git_revision": "b"})
    table = tabulate(tmp_path, ["lora_rank"], samples).set_index("point")
    assert table.loc["lora_rank=16", "versions"] == "python=3.11 torch=2.5.1 torch=2.13.0 vllm=1"
    # What was made by an earlier version has the revision of its clean-up.
    assert list(table["git_revision"]) == ["0" * 40, "0" * 40, "b", "b a"]


def test_a_model_as_it_is_and_a_given_adapter_have_no_value_of_a_control(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    edit_manifest(tmp_path / "lora_rank=4", settings={"adapter": "elsewhere", "model_format": "adapter"})
    table = tabulate(tmp_path, ["gpus", "lora_rank"], samples).set_index("point")
    assert table.loc[[BASELINE, "lora_rank=4"], ["gpus", "lora_rank"]].isna().all(axis=None)
    assert list(table.loc[["lora_rank=8", "lora_rank=16"], "lora_rank"]) == [8, 16]
    # A control that came later than the manifest has its default.
    assert list(table.loc[["lora_rank=8", "lora_rank=16"], "gpus"]) == [1, 1]


def test_a_point_that_is_not_evaluated_beside_others_has_a_row_and_no_part_in_the_answer(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    edit_manifest(tmp_path / "lora_rank=8", evaluation={})
    samples = samples[samples["point"] != "lora_rank=8"]
    row = tabulate(tmp_path, ["lora_rank"], samples).set_index("point").loc["lora_rank=8"]
    assert pd.isna(row["task"])
    assert row["steps"] == 20
    found = answer(tmp_path, ["lora_rank"], samples)
    assert found.best == "lora_rank=16"
    assert found.p_values is not None
    assert set(found.p_values) == {"lora_rank=4"}
    samples.to_parquet(tmp_path / "samples.parquet", index=False)
    assert "lora_rank=8" in report(tmp_path, ["lora_rank"])


def test_settings_that_were_not_run_on_the_deciding_task_have_no_part_in_its_statistics(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    whole = tabulate(tmp_path, ["lora_rank"], samples).set_index(["point", "task"])
    manifest = json.loads((tmp_path / "lora_rank=8/manifest.json").read_text())
    other = {"other": manifest["evaluation"]["tasks"][TASK]}
    edit_manifest(tmp_path / "lora_rank=8", evaluation={**manifest["evaluation"], "tasks": other})
    base = json.loads((tmp_path / BASELINE / "manifest.json").read_text())
    both = {**base["evaluation"]["tasks"], "other": base["evaluation"]["tasks"][TASK]}
    edit_manifest(tmp_path / BASELINE, evaluation={**base["evaluation"], "tasks": both})
    samples.loc[samples["point"] == "lora_rank=8", "task"] = "other"
    samples = pd.concat([samples, samples[samples["point"] == BASELINE].assign(task="other")])
    table = tabulate(tmp_path, ["lora_rank"], samples)
    assert sorted(zip(table["point"], table["task"], strict=True)) == [
        (BASELINE, TASK),
        (BASELINE, "other"),
        ("lora_rank=16", TASK),
        ("lora_rank=4", TASK),
        ("lora_rank=8", "other"),
    ]
    rows = table.set_index(["point", "task"])
    p, corrected = f"{METRIC}:p", f"{METRIC}:p_adjusted"
    assert list(rows.loc[("lora_rank=8", "other"), [p, corrected]]) == [whole.loc[("lora_rank=8", TASK), p]] * 2
    best = ("lora_rank=16", TASK)
    assert rows.loc[best, corrected] == pytest.approx(2 * whole.loc[best, p])  # by Holm, of two instead of three
    assert whole.loc[best, corrected] == pytest.approx(3 * whole.loc[best, p])
    found = answer(tmp_path, ["lora_rank"], samples)
    assert found.best == "lora_rank=16"
    assert set(found.p_values or ()) == {"lora_rank=4"}
    assert found.caveats[0] == f"1 setting was not evaluated on {TASK}, and not compared."
    samples.to_parquet(tmp_path / "samples.parquet", index=False)
    page = report(tmp_path, ["lora_rank"])
    assert found.caveats[0] in page
    assert "other-settings" in page


def test_the_loss_of_a_training_is_drawn_once_though_its_epochs_have_rows_of_their_own(tmp_path: Path) -> None:
    samples = make_results(tmp_path, {"lora_rank": [4, 8], "epoch": [1, 2]}, lambda settings: 0.5)
    for rank in (4, 8):
        name = f"epoch=1__lora_rank={rank}"
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        edit_manifest(tmp_path / name, training={**manifest["training"], "steps": 10})
        edit_manifest(tmp_path / f"epoch=2__lora_rank={rank}", training={**manifest["training"], "epochs": 2})
    samples.to_parquet(tmp_path / "samples.parquet", index=False)
    page = report(tmp_path, ["lora_rank", "epoch"])
    assert "Training loss of each step." in page
    drawn = (tmp_path / "plots/loss.svg").read_text()
    assert "lora_rank" in drawn
    assert "epoch=1" not in drawn


def test_points_of_other_samples_are_no_gain_where_the_interval_covers_none(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank({4: 0.3, 8: 0.3, 16: 0.3}))
    moved = samples["point"] == BASELINE
    samples.loc[moved, "sample"] = "other " + samples.loc[moved, "sample"]
    assert ": not significant" in answer(tmp_path, ["lora_rank"], samples).sentence


def test_a_metric_of_all_samples_is_compared_by_seeds(tmp_path: Path) -> None:
    samples = make_results(tmp_path, {"lora_rank": [4, 16], "seed": [0, 1, 2]}, lambda settings: 0.5)
    for file in tmp_path.glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        settings = manifest["settings"]
        f1 = 0.2 if not settings else 0.3 + settings["lora_rank"] / 32 + settings["seed"] / 1000
        manifest["evaluation"]["tasks"][TASK]["scores"] = {"f1/all": f1}
        file.write_text(json.dumps(manifest))
    found = answer(tmp_path, ["lora_rank", "seed"], samples, metric="f1/all")
    assert found.is_winner
    assert "above the base model" in found.sentence


def test_points_that_share_no_samples_are_not_paired(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    moved = samples["point"] == BASELINE
    samples.loc[moved, "sample"] = "other " + samples.loc[moved, "sample"]
    row = tabulate(tmp_path, ["lora_rank"], samples).set_index("point").loc["lora_rank=16"]
    assert row[f"{METRIC}:pairs"] == 0
    assert row[f"{METRIC}:delta_interval"] == UNPAIRED
    assert f"{METRIC}:p" not in row


def test_a_metric_that_is_no_mean_of_samples_has_no_interval(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    for file in tmp_path.glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        manifest["evaluation"]["tasks"][TASK]["scores"] = {METRIC: 7.5}
        file.write_text(json.dumps(manifest))
    table = tabulate(tmp_path, ["lora_rank"], samples)
    assert table[f"{METRIC}:low"].isna().all()
    assert table.set_index("point")[f"{METRIC}:delta"].dropna().eq(0).all()


def test_epochs_of_a_sample_are_one_score(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    twice = pd.concat([samples, samples.assign(epoch=2)])
    once, again = (tabulate(tmp_path, ["lora_rank"], frame) for frame in (samples, twice))
    pd.testing.assert_frame_equal(once, again)


def test_without_samples_the_table_has_numbers_alone(tmp_path: Path) -> None:
    make_results(tmp_path, RANKS, by_rank(RISING))
    table = tabulate(tmp_path, ["lora_rank"], None)
    assert table[METRIC].notna().all()
    assert table[f"{METRIC}:low"].isna().all()


def test_a_clear_winner_is_named(tmp_path: Path) -> None:
    found = answer(tmp_path, ["lora_rank"], make_results(tmp_path, RANKS, by_rank(RISING), samples=60))
    assert found.is_winner
    assert found.best == "lora_rank=16"
    assert "better than each of the 2 other settings (p" in found.sentence
    assert re.search(r"It is 0\.\d+ above the base model \(\+0\.\d+ to \+0\.\d+\), p < 0\.001", found.sentence)
    assert any("trained once" in caveat for caveat in found.caveats)


MODES = {"mode": ["A", "B1", "B2"]}


def test_modes_that_share_an_adapter_are_one_setting_and_are_counted_once(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 16], **MODES}
    samples = make_results(tmp_path, variables, by_rank(RISING), noise=0, samples=60)
    found = answer(tmp_path, list(variables), samples)
    assert found.sentence.startswith("lora_rank=16 scores best on letters: ")
    assert (found.best, found.equal, found.is_winner) == ("lora_rank=16", (), True)
    assert found.p_values is not None
    assert list(found.p_values) == ["lora_rank=4"]
    table = tabulate(tmp_path, list(variables), samples).set_index("point")
    row = table.loc["lora_rank=4__mode=B1"]
    assert (row["setting"], row["trained_setting"]) == ("lora_rank=4__mode=B1", "lora_rank=4")
    # Two adapters were compared with the base, not six.
    best = table.loc["lora_rank=16__mode=A"]
    assert best[f"{METRIC}:p_adjusted"] == pytest.approx(2 * best[f"{METRIC}:p"])
    settings = aggregate(table.reset_index(), list(variables), SampleScores(samples), 0.95).set_index("setting")
    best = settings.loc["lora_rank=16__mode=B2"]
    assert best[f"{METRIC}:p_adjusted"] == pytest.approx(2 * best[f"{METRIC}:p"])


@pytest.mark.parametrize("mode", ["A", "B2"])
def test_a_mode_that_lacks_a_seed_is_no_rival_of_the_others_which_count(tmp_path: Path, mode: str) -> None:
    variables = {"lora_rank": [4, 16], "mode": ["A", "B2"], "seed": [0, 1]}
    samples = make_results(tmp_path, variables, by_rank(RISING), samples=60)
    record = json.loads((tmp_path / "points.json").read_text())
    for name in record:
        edit_manifest(tmp_path / name, adapter_sha256=re.sub("mode=.*?__", "", name))
        record[name]["current"] = name != f"lora_rank=16__mode={mode}__seed=1"
    (tmp_path / "points.json").write_text(json.dumps(record))
    table = tabulate(tmp_path, list(variables), samples).query("mode != 'base'")
    assert set(table["trained_setting"]) == {"lora_rank=4", "lora_rank=16"}
    found = answer(tmp_path, list(variables), samples)
    assert (found.best, list(found.p_values or ())) == ("lora_rank=16", ["lora_rank=4"])
    both = table[(table["lora_rank"] == 16) & (table["mode"] != mode)]
    assert f"{both[METRIC].mean():.3f} (95% interval" in found.sentence
    assert ", 2 seeds)" in found.sentence


def test_of_the_modes_of_a_single_adapter_none_is_best(tmp_path: Path) -> None:
    found = answer(tmp_path, ["mode"], make_results(tmp_path, MODES, lambda settings: 0.8, noise=0))
    assert found.sentence.startswith("mode=A, mode=B1 and mode=B2 score equally on letters: match/accuracy 0.")
    assert ". They are 0." in found.sentence
    assert (found.best, found.is_winner, found.p_values) == (None, False, {})
    assert found.equal == ("mode=A", "mode=B1", "mode=B2")


def test_modes_with_other_adapters_are_settings_of_their_own(tmp_path: Path) -> None:
    samples = make_results(tmp_path, MODES, lambda settings: {"A": 0.4, "B1": 0.6, "B2": 0.9}[settings["mode"]])
    for mode in MODES["mode"]:
        edit_manifest(tmp_path / f"mode={mode}", adapter_sha256=mode * 32)
    found = answer(tmp_path, ["mode"], samples)
    assert found.best == "mode=B2"
    assert set(found.p_values or {}) == {"mode=A", "mode=B1"}


def test_modes_that_round_otherwise_are_told_and_the_first_counts(tmp_path: Path) -> None:
    samples = make_results(
        tmp_path, MODES, lambda settings: {"A": 0.7, "B1": 0.7, "B2": 0.75}[settings["mode"]], noise=0
    )
    found = answer(tmp_path, ["mode"], samples)
    assert found.sentence.startswith("The only setting scores on letters: match/accuracy 0.675")
    (caveat,) = (caveat for caveat in found.caveats if "its modes differ" in caveat)
    assert "in A, " in caveat
    assert caveat.endswith(" in B2. The first counts.")


def test_a_tie_is_told_as_a_tie(tmp_path: Path) -> None:
    chances = by_rank({4: 0.2, 8: 0.9, 16: 0.9})
    found = answer(tmp_path, ["lora_rank"], make_results(tmp_path, RANKS, chances, noise=0))
    assert found.sentence.startswith("lora_rank=8 and lora_rank=16 score equally on letters: match/accuracy 0.")
    assert ", better than lora_rank=4 (p < 0.001). They are 0." in found.sentence
    assert "best" not in found.sentence
    assert (found.best, found.equal, found.is_winner) == (None, ("lora_rank=8", "lora_rank=16"), False)
    assert set(found.p_values or {}) == {"lora_rank=4"}


def test_of_many_settings_that_tie_the_first_are_named(tmp_path: Path) -> None:
    ranks = {"lora_rank": list(range(1, 7))}
    found = answer(tmp_path, ["lora_rank"], make_results(tmp_path, ranks, lambda settings: 0.9, noise=0))
    assert found.sentence.startswith("lora_rank=1, lora_rank=2, lora_rank=3 and 3 more score equally")


def score_by(results: Path, tasks: Mapping[str, Mapping[str, float]]) -> None:
    """Have every point's scores of tasks be these, in this order."""
    for file in results.glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        scored = {task: {"scores": dict(scores), "samples": 40} for task, scores in tasks.items()}
        edit_manifest(file.parent, evaluation={**manifest["evaluation"], "tasks": scored})


def test_the_first_metric_of_the_scorer_decides_not_that_of_the_alphabet(tmp_path: Path) -> None:
    make_results(tmp_path, RANKS, by_rank(RISING))
    score_by(tmp_path, {TASK: {"f1/mean": 0.5, "f1/stderr": 0.1, "exact/mean": 0.4}, "other": {"recall/mean": 0.1}})
    table = tabulate(tmp_path, ["lora_rank"], None)
    assert choose_metric(tmp_path, table, [TASK, "other"], None) == "f1/mean"
    assert choose_metric(tmp_path, table, ["other", TASK], None) == "recall/mean"
    assert [name for name in table.columns if is_metric(name)] == ["f1/mean", "exact/mean", "recall/mean"]


def test_the_first_metric_of_each_task_decides_where_tasks_have_the_same_in_another_order(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    score_by(tmp_path, {TASK: {"f1/mean": 0.5, "exact/mean": 0.4}, "other": {"exact/mean": 0.1, "f1/mean": 0.2}})
    table = tabulate(tmp_path, ["lora_rank"], None)
    assert choose_metric(tmp_path, table, [TASK], None) == "f1/mean"
    assert choose_metric(tmp_path, table, ["other"], None) == "exact/mean"
    samples.to_parquet(tmp_path / "samples.parquet", index=False)
    titles = re.findall(r"(\w+/\w+) on (\w+)", report(tmp_path, ["lora_rank"]))
    assert {*titles} == {("f1/mean", TASK), ("exact/mean", "other")}


def test_the_first_metric_of_each_task_stays_first_where_tasks_share_metrics() -> None:
    assert order_metrics([["b", "c"], ["x"], ["a", "c"], ["z", "b"]]) == ["z", "b", "a", "c", "x"]
    assert order_metrics([["b", "a"], ["a", "b"]]) == ["b", "a"]


def find_caveats(found: Answer, words: str) -> list[str]:
    return [caveat for caveat in found.caveats if words in caveat]


def test_the_side_on_which_a_grid_may_go_on_is_told(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 8, 16], "lr": [1e-4, 3e-4, 1e-3], "packed": [True, False]}
    samples = make_results(
        tmp_path, variables, lambda s: s["lora_rank"] / 20 - 100 * s["lr"] + s["packed"] / 10, noise=0
    )
    found = answer(tmp_path, list(variables), samples)
    assert find_caveats(found, "that were tried") == [
        "The best lora_rank, 16, is the largest of 3 that were tried: larger ones may be better.",
        "The best lr, 1e-4, is the smallest of 3 that were tried: smaller ones may be better.",
    ]


@pytest.mark.parametrize("chances", [{4: 0.4, 8: 0.9, 16: 0.4}, {4: 0.9, 8: 0.4, 16: 0.9}])
def test_a_best_value_inside_the_grid_or_at_both_ends_needs_no_more(
    tmp_path: Path, chances: Mapping[int, float]
) -> None:
    found = answer(tmp_path, ["lora_rank"], make_results(tmp_path, RANKS, by_rank(chances), noise=0))
    assert not find_caveats(found, "that were tried")


def test_samples_that_are_too_few_are_told_with_how_many_would_do(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank({4: 0.4, 8: 0.8, 16: 0.84}), base_chance=0.75)
    found = answer(tmp_path, ["lora_rank"], samples)
    (rival, base) = find_caveats(found, "40 samples are too few")
    assert re.search(r"from lora_rank=\d+: a difference of 0\.\d+ takes about [\d,]+ to be found .* of 80%\.", rival)
    assert "from the base model" in base
    clear = answer(tmp_path, ["lora_rank"], samples, higher_is_better=False)
    assert not find_caveats(clear, "too few to tell the best setting from lora_rank")


def test_seeds_that_differ_more_than_settings_are_told(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 8], "seed": [0, 1, 2]}
    samples = make_results(tmp_path, variables, lambda s: 0.3 + 0.2 * s["seed"] + s["lora_rank"] / 100)
    assert find_caveats(answer(tmp_path, list(variables), samples), "Seeds differ more than settings")
    (tmp_path / "other").mkdir()
    samples = make_results(tmp_path / "other", variables, lambda s: 0.1 * s["lora_rank"] + s["seed"] / 50)
    assert not find_caveats(answer(tmp_path / "other", list(variables), samples), "Seeds differ more than settings")


def test_clusters_of_samples_widen_intervals_and_without_them_samples_are_said_to_be_independent(
    tmp_path: Path,
) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    alone = answer(tmp_path, ["lora_rank"], samples)
    assert find_caveats(alone, "Samples are taken as independent. If several are about one text")
    assert find_caveats(answer(tmp_path, ["lora_rank"], samples, cluster="text"), "letters have no text in their meta")
    right = samples[samples["point"] == "lora_rank=8"].set_index("sample")["value"]
    # Samples of one answer are of one text, ten of them each.
    place = right.sort_values(kind="stable").reset_index().reset_index().set_index("sample")["index"]
    clustered = samples.assign(cluster=samples["sample"].map(place) // 10)
    found = answer(tmp_path, ["lora_rank"], clustered, cluster="text")
    assert not find_caveats(found, "independent")
    independent, by_text = (
        tabulate(tmp_path, ["lora_rank"], frame).set_index("point").loc["lora_rank=8"] for frame in (samples, clustered)
    )
    assert by_text[f"{METRIC}:stderr"] > 2 * independent[f"{METRIC}:stderr"]
    assert by_text[f"{METRIC}:low"] < independent[f"{METRIC}:low"]
    assert by_text[f"{METRIC}:p"] > independent[f"{METRIC}:p"]


@pytest.mark.parametrize(
    ("values", "is_noted"),
    [
        (RANKS, True),
        ({"lora_rank": [4, 8], "lora_alpha": [16, 32]}, False),
        ({"lora_rank": [4, 8], "lora_alpha": ["r"]}, True),
        ({"lora_rank": [4, 8], "lr": [1e-4, 1e-3]}, False),
        ({"lora_rank": [4], "lr": [1e-4, 1e-3]}, False),
        ({"lr": [1e-4, 1e-3]}, False),
    ],
)
def test_ranks_at_one_learning_rate_are_noted_where_alpha_grows_with_them(
    tmp_path: Path, values: dict[str, list[float]], is_noted: bool
) -> None:
    found = answer(tmp_path, list(values), make_results(tmp_path, values, lambda settings: 0.5))
    assert any("Ranks were compared at one learning rate" in caveat for caveat in found.caveats) == is_noted


def test_a_variable_with_words_and_numbers_is_a_column_of_text(tmp_path: Path) -> None:
    samples = make_results(tmp_path, {"lora_alpha": ["r", 8]}, lambda settings: 0.5)
    table = tabulate(tmp_path, ["lora_alpha"], samples)
    assert set(table["lora_alpha"].dropna()) == {"r", "8"}
    table.to_parquet(tmp_path / "table.parquet")


def test_no_winner_is_declared_inside_the_noise(tmp_path: Path) -> None:
    found = answer(tmp_path, ["lora_rank"], make_results(tmp_path, RANKS, by_rank({4: 0.4, 8: 0.8, 16: 0.84})))
    assert not found.is_winner
    assert found.p_values is not None
    tied = "lora_rank=8" if found.best == "lora_rank=16" else "lora_rank=16"
    assert found.p_values[tied] > 0.05 > found.p_values["lora_rank=4"]
    assert f"not significantly better than 1 of 2 others: {tied}" in found.sentence


def test_of_settings_that_are_all_alike_one_seldom_wins(tmp_path: Path) -> None:
    ranks = {"lora_rank": list(range(1, 9))}
    wins, gains, worse = [], [], []
    for seed in range(25):
        results = tmp_path / str(seed)
        results.mkdir()
        samples = make_results(results, ranks, lambda settings: 0.5, samples=30, base_chance=0.5, steps=0, seed=seed)
        found = answer(results, ["lora_rank"], samples)
        wins.append(found.is_winner)
        gains.append(": not significant" not in found.sentence)
        worse.append(any(p_value <= 0.05 for p_value in (found.p_values or {}).values()))
    assert sum(wins) <= 1
    assert sum(worse) <= 3
    assert sum(gains) <= 4


def test_a_best_setting_that_is_worse_than_the_base_is_called_so(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank({4: 0.1, 8: 0.15, 16: 0.2}), base_chance=0.9)
    assert "below the base model" in answer(tmp_path, ["lora_rank"], samples).sentence
    assert "It is worse than the base model." in answer(tmp_path, ["lora_rank"], samples).sentence


def test_less_can_be_better(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    assert answer(tmp_path, ["lora_rank"], samples, higher_is_better=False).best == "lora_rank=4"


def test_an_experiment_that_was_not_evaluated_has_no_best(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank(RISING))
    found = answer(tmp_path, ["lora_rank"], samples, task=None, metric=None)
    assert (found.best, found.is_winner) == (None, False)
    assert "not evaluated" in found.sentence


def test_a_metric_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    table = tabulate(tmp_path, ["lora_rank"], make_results(tmp_path, RANKS, by_rank(RISING)))
    assert choose_metric(tmp_path, table, [TASK], None) == METRIC
    with pytest.raises(InputError, match=r"report\.metric: 'f1' .* Expected: match/accuracy"):
        choose_metric(tmp_path, table, [TASK], "f1")


def test_replicates_are_a_setting_with_an_interval_over_seeds_and_samples(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 16], "seed": [0, 1, 2]}
    samples = make_results(tmp_path, variables, lambda s: {4: 0.5, 16: 0.9}[s["lora_rank"]] + 0.03 * s["seed"])
    table = tabulate(tmp_path, list(variables), samples)
    settings = aggregate(table, list(variables), SampleScores(samples), 0.95).set_index("setting")
    assert set(settings.index) == {BASELINE, "lora_rank=4", "lora_rank=16"}
    row = settings.loc["lora_rank=4"]
    means = table[table["setting"] == "lora_rank=4"][METRIC].astype(float)
    assert row["seeds"] == 3
    assert row[METRIC] == pytest.approx(means.mean())
    half = 4.3027 * means.std() / 3**0.5
    assert row[f"{METRIC}:high"] - row[f"{METRIC}:low"] >= 1.5 * half
    assert row[f"{METRIC}:interval"] == EFFECTIVE_WILSON
    found = answer(tmp_path, list(variables), samples)
    assert "3 seeds" in found.sentence
    assert not any("trained once" in caveat for caveat in found.caveats)


def test_seeds_that_scatter_leave_no_winner_that_samples_alone_would_name(tmp_path: Path) -> None:
    chances = {(4, 0): 0.2, (4, 1): 0.9, (16, 0): 0.5, (16, 1): 1.0}
    variables = {"lora_rank": [4, 16], "seed": [0, 1]}
    samples = make_results(tmp_path, variables, lambda s: chances[s["lora_rank"], s["seed"]], samples=200)
    assert not answer(tmp_path, list(variables), samples).is_winner
    alone = samples[~samples["point"].str.contains("seed=1")]
    record = json.loads((tmp_path / "points.json").read_text())
    (tmp_path / "points.json").write_text(json.dumps({k: v for k, v in record.items() if "seed=1" not in k}))
    assert answer(tmp_path, list(variables), alone).is_winner


def test_a_run_that_is_called_like_a_setting_is_none_of_its_replicates(tmp_path: Path) -> None:
    samples = make_results(tmp_path, {"lora_rank": [4, 16], "seed": [0, 1]}, lambda settings: 0.5)
    settings = {"lora_rank": 4, "seed": 0, "lr": 1.0}
    run = make_point(tmp_path, "lora_rank=4", settings, np.ones(40), 5)
    samples = pd.concat([samples, pd.DataFrame(run, columns=samples.columns)])
    record = json.loads((tmp_path / "points.json").read_text())
    (tmp_path / "points.json").write_text(
        json.dumps({**record, "lora_rank=4": {"current": True, "settings": settings}})
    )
    table = tabulate(tmp_path, ["lora_rank", "seed"], samples).groupby("setting")["point"].apply(set)
    assert {"lora_rank=4"} in table.tolist()
    assert {"lora_rank=4__seed=0", "lora_rank=4__seed=1"} in table.tolist()


def test_a_point_that_was_made_with_other_settings_has_no_row(tmp_path: Path) -> None:
    make_results(tmp_path, {"lora_rank": [4, 16]}, lambda settings: 0.5)
    record = json.loads((tmp_path / "points.json").read_text())
    record["lora_rank=4"]["settings"]["lr"] = 1e-3
    (tmp_path / "points.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"lora_rank=4/manifest.json: lr is None, but the experiment says 0.001; run"):
        check_manifests(tmp_path, ["lora_rank=4", "lora_rank=16"])
    check_manifests(tmp_path, ["lora_rank=16", "baseline"])


def test_many_and_long_trainings_are_drawn_within_bounds(tmp_path: Path) -> None:
    points = [f"p{index}" for index in range(120)]
    steps = pd.DataFrame({"step": range(1, 1001), "loss": np.linspace(3, 1, 1000), "validation_loss": None})
    table = pd.DataFrame({"point": points, "mode": "B1", "lora_rank": range(120), "lora_scale": 2.0})
    plot = draw_losses(pd.concat([steps.assign(point=point) for point in points]), table, ["lora_rank"])
    assert plot is not None
    [data] = plot.spec["datasets"].values()
    assert 10_000 < len(data) <= MOST_DOTS
    assert "means of 4 steps" in plot.caption
    times = pd.date_range("2026-01-01", periods=9000, freq="s").astype(str)
    temporary = np.zeros(9000)
    temporary[4321] = 7e9
    storage = draw_storage(pd.DataFrame({"time": times, "kept_bytes": 1e9, "temporary_bytes": temporary}))
    assert storage is not None
    [data] = storage.spec["datasets"].values()
    assert len(data) <= 2 * MOST_MOMENTS
    assert max(row["size"] for row in data) == 7


def test_the_list_has_the_best_of_many_settings(tmp_path: Path) -> None:
    variables = {"lora_rank": list(range(1, 31)), "lr": [1e-4, 1e-3]}
    samples = make_results(tmp_path, variables, lambda s: s["lora_rank"] / 31, steps=0)
    table = tabulate(tmp_path, list(variables), samples)
    settings = aggregate(table, list(variables), SampleScores(samples), 0.95)
    for higher_is_better in (True, False):
        listed = draw_metric(settings, table, list(variables), TASK, METRIC, higher_is_better)[-1]
        drawn = [row["value"] for rows in listed.spec["datasets"].values() for row in rows if len(rows) > 1]
        values = settings[settings["mode"] != "base"][METRIC]
        assert (max(drawn) if higher_is_better else min(drawn)) == (values.max() if higher_is_better else values.min())


def test_an_interval_that_is_wide_for_lack_of_seeds_does_not_squeeze_the_axis(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 8, 16], "seed": [0, 1]}
    samples = make_results(tmp_path, variables, lambda settings: 0.5)
    # A metric of another range, and no mean over samples: its intervals are by two seeds.
    for file in tmp_path.glob("*/manifest.json"):
        settings = json.loads(file.read_text())["settings"]
        loss = 3 + settings.get("lora_rank", 0) / 10 + settings.get("seed", 0) / 2
        score_by_point = {TASK: {"scores": {"loss/total": loss}, "samples": 40}}
        edit_manifest(file.parent, evaluation={"tasks": score_by_point})
    table = tabulate(tmp_path, list(variables), samples)
    settings = aggregate(table, list(variables), SampleScores(samples), 0.95)
    assert settings["loss/total:high"].max() > 7.5
    for plot in draw_metric(settings, table, list(variables), TASK, "loss/total"):
        rows = [row for data in plot.spec["datasets"].values() for row in data]
        ends = [row[end] for row in rows for end in ("low", "high") if row[end] is not None]
        # Values are from 3.0, the base's, to 5.1.
        assert 0.9 - 1e-9 <= min(ends) < max(ends) <= 7.2 + 1e-9
        assert "An arrow: the interval goes on beyond the plot." in plot.caption


def test_only_metrics_are_metrics() -> None:
    columns = ["match/accuracy", "match/stderr", "match/accuracy:low", "a:b/mean", "point", "data_sha256"]
    assert [column for column in columns if is_metric(column)] == ["match/accuracy", "a:b/mean"]


SPACE = {"lora_rank": [4, 8], "lr": [1e-4, 1e-3], "packed": [True, False], "epochs": [1, 2]}


@pytest.mark.parametrize(
    ("count", "marks"),
    [
        (0, {"rule", "point"}),
        (1, {"line", "rule", "point"}),
        (2, {"rect", "text"}),
        (3, {"line", "rule"}),
        (4, {"line", "point"}),
    ],
)
def test_the_number_of_variables_chooses_the_plot(tmp_path: Path, count: int, marks: set[str]) -> None:
    variables = dict(list(SPACE.items())[:count]) or {"lora_rank": [4]}
    samples = make_results(tmp_path, variables, lambda settings: 0.7)
    table = tabulate(tmp_path, list(variables), samples)
    settings = aggregate(table, list(variables), SampleScores(samples), 0.95)
    first, *rest = draw_metric(settings, table, list(variables), TASK, METRIC)
    text = json.dumps(first.spec)
    assert marks <= set(re.findall(r'"mark": {"type": "(\w+)"', text))
    assert ("facet" in first.spec) == (count == 3)
    assert len(rest) == (1 if count > 1 else 0)
    # Every value that was measured is in what is drawn.
    drawn = {round(value, 6) for value in map(float, re.findall(r'"value": ([\d.]+)', text))}
    assert {round(value, 6) for value in table[table["point"] != BASELINE][METRIC].astype(float)} <= drawn


def test_stages_are_those_of_the_modes() -> None:
    points = {"a": "A", "b": "B1", "c": "B2", "given": "B2", BASELINE: "base"}
    stages = {stage.rule: stage for stage in get_stages(points, points, ["a", "c"], ["a", "b", "c"])}
    assert {rule: stage.jobs for rule, stage in stages.items()} == {
        "configure": 2,
        "train": 2,
        "take": 3,
        "adopt": 1,
        "export": 1,
        "merge": 1,
        "evaluate": 3,
        "evaluate_adapters": None,
        "publish": 2,
        "cleanup": 5,
        "read_samples": 1,
        "collect": 1,
        "report": 1,
    }
    assert stages["evaluate_adapters"].after == ("take", "adopt")
    assert stages["cleanup"].after == ("evaluate", "publish")
    stages = {s.rule: s for s in get_stages(points, points, ["a", "c"], ["a", "b", "c"], chooses_epoch=True)}
    assert [(stages[rule].jobs, stages[rule].after) for rule in ("choose_epoch", "take")] == [
        (2, ("train",)),
        (3, ("choose_epoch",)),
    ]


STAGE: dict[str, Any] = {"rule": "train", "jobs": 3, "after": []}


class Links(HTMLParser):
    """The targets of links, and everything that a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if tag == "a" and name == "href":
                self.links.append(str(value))
            elif name in ("src", "href"):
                self.loaded.append(str(value))


def report(results: Path, variables: Sequence[str]) -> str:
    collect(results, variables)
    make_report(
        results / "results.csv",
        [STAGE, {"rule": "cleanup", "jobs": 4, "after": ["train"]}],
        results / "report.html",
        results / "plots",
    )
    return (results / "report.html").read_text(encoding="utf-8")


def test_the_report_has_the_answer_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    results = tmp_path / "ranks"
    results.mkdir()
    make_results(results, RANKS, by_rank(RISING))
    log = results / "logs/train/lora_rank=32.log"
    log.parent.mkdir(parents=True)
    log.write_text("a line\n<b>CUDA out of memory</b>\n")
    failure = {"rule": "train", "point": "lora_rank=32", "reason": "the GPU's memory <was> not enough", "log": str(log)}
    (results / "failures.json").write_text(json.dumps([failure]))
    assert "the GPU&#39;s memory" not in report(results, ["lora_rank"])  # all are done: that was an earlier run
    for file in ("results.csv", "results.parquet", "replicates.csv", "answer.json"):
        stem, _, kind = file.partition(".")
        shutil.copy(results / file, results / f"{stem}-partial.{kind}")
    make_report(results / "results-partial.csv", [STAGE], results / "report-partial.html", results / "plots-partial")
    page = (results / "report-partial.html").read_text()
    sentence = json.loads((results / "answer.json").read_text())["sentence"]
    assert html.escape(sentence) in page.replace("<b>", "").replace("</b>", "")
    assert "the GPU&#39;s memory &lt;was&gt; not enough" in page
    assert "&lt;b&gt;CUDA out of memory&lt;/b&gt;" in page
    assert "<td>variables</td><td>{lora_rank: [4, 8, 16]}</td>" in page
    links = Links(page)
    assert links.loaded == ["data:,"]
    assert all((results / link).exists() for link in links.links), links.links
    assert sorted(file.name for file in (results / "plots").iterdir()) == [
        *("letters-by-lora_rank-dark.svg", "letters-by-lora_rank.svg", "loss-dark.svg", "loss.svg"),
        *("storage-dark.svg", "storage.svg"),
    ]
    table = pd.read_parquet(results / "results.parquet")
    same = pd.read_csv(results / "results.csv")
    assert list(same.columns) == list(table.columns)
    assert same[f"{METRIC}:low"].tolist() == pytest.approx(table[f"{METRIC}:low"].tolist())


def test_an_experiment_cannot_put_markup_into_its_report(tmp_path: Path) -> None:
    results = tmp_path / "ranks"
    results.mkdir()
    make_results(results, RANKS, by_rank(RISING))
    experiment = results / "experiment.yaml"
    experiment.write_text(experiment.read_text().replace("Which setting", "</script><script>alert(1)</script>Which"))
    assert "<script>alert(1)" not in report(results, ["lora_rank"])


def test_each_gpu_of_an_evaluation_is_paid(tmp_path: Path) -> None:
    samples = make_results(tmp_path, {"lora_rank": [4]}, by_rank(RISING))
    file = tmp_path / "lora_rank=4/manifest.json"
    manifest = json.loads(file.read_text()) | {"device": "cuda", "seconds": {"train": 3600, "evaluate": 1800}}
    manifest["evaluation"]["gpus"] = 4
    file.write_text(json.dumps(manifest))
    assert tabulate(tmp_path, ["lora_rank"], samples).set_index("point").loc["lora_rank=4", "gpu_hours"] == 1 + 4 * 0.5


def measure(results: Path, point: str, settings: dict[str, Any] | None = None, **usage: Any) -> None:
    """Put what was measured of a point's jobs into its manifest."""
    file, record = results / point / "manifest.json", json.loads((results / "points.json").read_text())
    manifest = json.loads(file.read_text()) | {"usage": usage}
    manifest["settings"] |= settings or {}
    record[point]["settings"] |= settings or {}
    file.write_text(json.dumps(manifest))
    (results / "points.json").write_text(json.dumps(record))


def test_a_job_whose_gpu_idled_is_named_with_what_to_change(tmp_path: Path) -> None:
    make_results(tmp_path, RANKS, by_rank(RISING))
    memory = {"gpu_memory_bytes": 80e9, "gpus": 1, "cores": 4, "cpu_busy": 0.2}
    idle = {"seconds": 3600.0, "gpu_busy": 0.2, "peak_gpu_memory_bytes": 9e9, **memory}
    full = {"seconds": 600.0, "gpu_busy": 0.4, "peak_gpu_memory_bytes": 79e9, **memory}
    batch = {**idle, "seconds": 90.0, "points": 2}
    steps = {"batch_size": 2, "gradient_accumulation_steps": 8}
    measure(tmp_path, "lora_rank=4", steps, train=idle, evaluate_adapters=batch)
    measure(tmp_path, "lora_rank=8", {"packed": True, "compile": True}, train=full, evaluate_adapters=batch)
    measure(tmp_path, "lora_rank=16", train={**idle, "gpu_busy": 0.9}, evaluate={**idle, "seconds": 30.0})
    page = report(tmp_path, ["lora_rank"])
    section = html.unescape(page[page.index('<h2 id="usage">') : page.index('<h2 id="comparisons">')])
    named = re.findall(r"<li>(.*?)</li>", section)
    # Of the same time, the one with more idle hours first; a job of half a minute is not named, and a batch once.
    assert [line.partition(": ")[0] for line in named] == [
        *("train of lora_rank=4", "train of lora_rank=8", "evaluate_adapters of lora_rank=4 and 1 more")
    ]
    assert "a larger batch_size than 2, with fewer gradient_accumulation_steps than 8; packed: true" in named[0]
    assert "At most 9 GB of 80 GB of its memory were in use, which leaves room for a larger batch." in named[0]
    assert "To try: enable_activation_checkpointing: true, then a larger batch_size." in named[1]
    assert "as it is, a larger batch has no room" in named[1]
    assert "a larger evaluation.max_connections" in named[2]
    assert "<td>train</td><td>3</td><td>43 min</td><td>54%</td><td>20%</td><td>79 GB of 80 GB</td>" in section
    (tmp_path / "benchmarks/prune").mkdir(parents=True)
    (tmp_path / "benchmarks/prune/after=2.json").write_text(json.dumps(idle))
    labels = {f"lora_rank={rank}": str(rank) for rank in RANKS["lora_rank"]}
    usages = [describe_usage(tmp_path, labels, rungs) for rungs in ([1, 2], [1])]
    told = [[job for job, _ in usage.idle] for usage in usages if usage]
    assert told[0][1] == "prune of the trainings after epoch 2"
    assert told[0][:1] + told[0][2:] == told[1]
    table = pd.read_csv(tmp_path / "results.csv").set_index("point")
    # The hour of the training, and half of the batch's 90 seconds.
    assert table.loc["lora_rank=4", ["gpu_busy", "peak_gpu_memory_bytes", "cpu_busy"]].tolist() == [0.2, 9e9, 0.2]
    assert table.loc["lora_rank=16", "gpu_busy"] == pytest.approx((3600 * 0.9 + 30 * 0.2) / 3630, abs=0.001)


IDLE = {"seconds": 100.0, "gpus": 1, "cores": 4, "gpu_busy": 0.2, "gpu_memory_bytes": 80e9}
FULL = IDLE | {"peak_gpu_memory_bytes": 79e9}
CONNECTIONS = "a larger evaluation.max_connections"
LOWERED = "Its batch_size was lowered to 2, as the memory was not enough."
RECOMPUTED = "checkpointing: true, then a larger batch_size than 2, with fewer gradient_accumulation_steps than 8;"
STEPS = {"batch_size": 8, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    ("rule", "record", "settings", "used", "backend", "said", "unsaid"),
    [
        ("train", FULL, {"enable_activation_checkpointing": True}, 1, "hf", ["compile"], ["batch_size"]),
        ("train", IDLE, STEPS, 2, "hf", [RECOMPUTED, LOWERED], []),
        ("evaluate", FULL, {}, 1, "hf", ["To try: mode B2", "has no room"], [CONNECTIONS]),
        ("choose_epoch", IDLE, {}, 1, "hf", [CONNECTIONS], ["mode B2"]),
        ("choose_epoch", FULL, {}, 1, "hf", ["busy for 20% of 2 min. At most"], ["To try"]),
        ("evaluate_adapters", FULL, {}, 1, "vllm", [CONNECTIONS], ["memory"]),
        ("prune", FULL, {}, 1, "vllm", [CONNECTIONS], ["memory"]),
    ],
)
def test_advice_to_an_idle_job_fits_its_memory_and_what_it_did(
    tmp_path: Path,
    rule: str,
    record: dict[str, Any],
    settings: dict[str, Any],
    used: int,
    backend: str,
    said: list[str],
    unsaid: list[str],
) -> None:
    make_results(tmp_path, {"lora_rank": [4]}, by_rank(RISING))
    manifest = json.loads((tmp_path / "lora_rank=4/manifest.json").read_text())
    training, evaluation = manifest["training"] | {"batch_size_used": used}, {"backend": backend}
    edit_manifest(tmp_path / "lora_rank=4", training=training, evaluation=manifest["evaluation"] | evaluation)
    measure(tmp_path, "lora_rank=4", settings, **{"train" if rule == "prune" else rule: record})
    (tmp_path / "benchmarks/prune").mkdir(parents=True)
    if rule == "prune":
        (tmp_path / "benchmarks/prune/after=1.json").write_text(json.dumps(record))
    usage = describe_usage(tmp_path, {"lora_rank=4": "4"}, [1])
    assert usage
    [advice] = [text for job, text in usage.idle if job.startswith(f"{rule} of")]
    assert [text for text in said if text not in advice] == []
    assert [text for text in unsaid if text in advice] == []


def test_the_page_says_that_the_gpu_time_of_b2_leaves_out_what_a_batch_shares(tmp_path: Path) -> None:
    said = "The GPU time of an evaluation in mode B2 is that of its tasks"
    make_results(tmp_path, {"mode": ["B1", "B2"]}, lambda settings: 0.5)
    assert said not in report(tmp_path, ["mode"])
    edit_manifest(tmp_path / "mode=B1", device="cuda")
    assert said not in report(tmp_path, ["mode"])
    edit_manifest(tmp_path / "mode=B2", device="cuda")
    assert said in report(tmp_path, ["mode"])


def test_the_report_says_of_no_slice_that_it_was_busy(tmp_path: Path) -> None:
    make_results(tmp_path, RANKS, by_rank(RISING))
    slice_of_a_gpu = {"seconds": 100.0, "cores": 4, "cpu_busy": 0.5, "gpus": 1, "peak_gpu_memory_bytes": 9}
    measure(tmp_path, "lora_rank=4", train=slice_of_a_gpu)
    page = report(tmp_path, ["lora_rank"])
    assert "<td>train</td><td>1</td><td>2 min</td><td>not known</td>" in page
    said = "No job of a minute or more kept its GPUs busy for less"
    assert said not in page
    measure(tmp_path, "lora_rank=4", train=slice_of_a_gpu | {"gpu_busy": 0.9})
    assert said in report(tmp_path, ["lora_rank"])


def test_without_a_gpu_the_report_has_the_load_of_the_cores_and_names_no_job(tmp_path: Path) -> None:
    make_results(tmp_path, RANKS, by_rank(RISING))
    assert 'id="usage"' not in report(tmp_path, ["lora_rank"])  # results of an earlier version
    for rank, busy in zip(RANKS["lora_rank"], (0.1, 0.5, 0.9), strict=True):
        measure(tmp_path, f"lora_rank={rank}", train={"seconds": 100.0, "cores": 4, "cpu_busy": busy})
    page = report(tmp_path, ["lora_rank"])
    section = page[page.index('<h2 id="usage">') : page.index('<h2 id="comparisons">')]
    assert "How busy the cores were" in section
    assert "<td>train</td><td>3</td><td>2 min</td><td>50%</td><td>10%</td></tr>" in section
    assert "<li>" not in section
    for rank in RANKS["lora_rank"]:  # trainings that an earlier run had done
        measure(tmp_path, f"lora_rank={rank}", train={"seconds": 0.0, "cores": 4, "cpu_busy": 0.0})
    assert "<td>train</td><td>3</td><td>0 s</td><td>not known</td>" in report(tmp_path, ["lora_rank"])


def test_a_huge_interval_leaves_room_for_the_values_and_ends_in_an_arrow(tmp_path: Path) -> None:
    samples = make_results(tmp_path, {"lora_rank": [4, 8], "lr": [1e-4, 1e-3]}, lambda settings: 0.5)
    table = tabulate(tmp_path, ["lora_rank", "lr"], samples)
    settings = aggregate(table, ["lora_rank", "lr"], SampleScores(samples), 0.95)
    wide = settings["setting"] == "lora_rank=4__lr=1e-4"
    settings.loc[wide, [f"{METRIC}:low", f"{METRIC}:high"]] = -4.3, 5.1
    listed = draw_metric(settings, table, ["lora_rank", "lr"], TASK, METRIC)[-1]
    rows = [row for data in listed.spec["datasets"].values() for row in data]
    [cut] = [row for row in rows if row["is_low_cut"] or row["is_high_cut"]]
    assert (cut["whole_low"], cut["whole_high"]) == (-4.3, 5.1)
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows)
    assert "An arrow: the interval goes on beyond the plot." in listed.caption
    assert {"triangle-left", "triangle-right"} <= set(re.findall(r"triangle-\w+", json.dumps(listed.spec)))


def test_intervals_that_are_all_wide_for_their_values_are_drawn_whole(tmp_path: Path) -> None:
    samples = make_results(tmp_path, RANKS, by_rank({4: 0.5, 8: 0.5, 16: 0.52}))
    table = tabulate(tmp_path, ["lora_rank"], samples)
    settings = aggregate(table, ["lora_rank"], SampleScores(samples), 0.95)
    [plot] = draw_metric(settings, table, ["lora_rank"], TASK, METRIC)
    rows = [row for data in plot.spec["datasets"].values() for row in data]
    assert len(rows) == 4
    assert not any(row["is_low_cut"] or row["is_high_cut"] for row in rows)
    assert "An arrow" not in plot.caption


def test_many_loss_curves_are_coloured_by_the_variable_that_separates_them(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 8, 16, 32, 64], "lr": [1e-4, 1e-3, 1e-2]}
    samples = make_results(tmp_path, variables, lambda settings: 0.5)
    table = tabulate(tmp_path, list(variables), samples)
    trained = table[table["mode"] != "base"]
    losses = pd.DataFrame(
        [(row.point, step, 1 / step + 0.1 * row.lr, None) for row in trained.itertuples() for step in (1, 2, 3)],
        columns=["point", "step", "loss", "validation_loss"],
    )
    plot = draw_losses(losses, trained, list(variables))
    assert plot is not None
    [data] = plot.spec["datasets"].values()
    assert {row["series"] for row in data} == {"1e-4", "1e-3", "1e-2"}
    assert plot.spec["layer"][0]["encoding"]["color"]["title"] == "lr"


def test_low_stands_before_high_in_every_table(tmp_path: Path) -> None:
    samples = make_results(tmp_path, {"lora_rank": [4, 8], "seed": [0, 1]}, lambda settings: 0.5)
    samples.to_parquet(tmp_path / "samples.parquet", index=False)
    collect(tmp_path, ["lora_rank", "seed"])
    for name in ("results.csv", "replicates.csv"):
        columns = list(pd.read_csv(tmp_path / name).columns)
        first = columns.index(METRIC)
        facts = [column.rpartition(":")[2] for column in columns[first + 1 :] if column.startswith(f"{METRIC}:")]
        assert facts == [fact for fact in FACTS if fact in facts]
        assert columns.index(f"{METRIC}:low") + 1 == columns.index(f"{METRIC}:high")


def test_equal_settings_of_two_models_have_no_gain_in_common(tmp_path: Path) -> None:
    variables, base_chance = {"model": ["small", "large"]}, {"small": 0.1, "large": 0.4}
    samples = make_results(tmp_path, variables, lambda settings: 0.7, base_chance=base_chance, noise=0)
    names = [f"baseline__model={name}" for name in base_chance]
    scores = SampleScores(samples)
    table = make_table(tmp_path, [*names, "model=small", "model=large"], [*variables], scores, 0.95)
    settings = aggregate(table, [*variables], scores, 0.95)
    assert settings[f"{METRIC}:delta"].nunique() == 2
    found = find_answer(table, settings, scores, [*variables], TASK, METRIC, higher_is_better=True, confidence=0.95)
    assert re.fullmatch(r"model=(small|large) and model=(small|large) score equally on letters: .*\)\.", found.sentence)


def add_run(results: Path, samples: pd.DataFrame, name: str, settings: dict[str, Any], *, count: int) -> None:
    """Add a point that was not trained here; `count` is the number of its samples, with scores as in `samples`."""
    rows = make_point(results, name, settings, samples["value"].head(count).to_numpy(), 0)
    pd.DataFrame([*samples.to_numpy(), *rows], columns=samples.columns).to_parquet(results / "samples.parquet")
    record = json.loads((results / "points.json").read_text())
    record[name] = {"current": True, "settings": settings, "swept": [], "is_run": True}
    (results / "points.json").write_text(json.dumps(record))


def test_the_path_of_another_baseline_is_no_model_in_the_report(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 8], "model": ["small", "large"]}
    samples = make_results(tmp_path, variables, lambda settings: 0.5, base_chance={"small": 0.3, "large": 0.4})
    settings = {"mode": "base", "model": "models/a_model_of_others"}
    add_run(tmp_path, samples, "other", settings, count=100)
    page = report(tmp_path, [*variables])
    assert "models/a_model_of_others" not in page
    assert re.search(r"<th[^>]*>(<[^>]*>)*model<", page)


@pytest.mark.parametrize("values", [[None, 0.5, 1.0], [None, 1.0]])
def test_null_has_its_place_in_the_plot_and_the_table_of_the_only_variable(tmp_path: Path, values: list[Any]) -> None:
    samples = make_results(tmp_path, {"clip_grad_norm": values}, lambda settings: 0.5)
    settings = {"adapter": "a", "mode": "B1"}
    add_run(tmp_path, samples, "given", settings, count=40)
    page = report(tmp_path, ["clip_grad_norm"])
    assert "Only in the table: 1 settings that are not trained." in page
    drawn = (tmp_path / f"plots/{TASK}-by-clip_grad_norm.svg").read_text()
    assert all(f">{value}</text>" in drawn for value in ("null", *map("{:g}".format, values[1:])))
    assert ">clip_<wbr>grad_<wbr>norm</th>" in page
    assert page.count('<td class="aside">null</td>') == 1


@pytest.mark.parametrize("variables", [{"model": ["small", "large"]}, {"clip_grad_norm": [None, 1.0]}])
def test_single_trainings_in_a_plot_are_all_those_of_its_settings_and_no_base_model(
    tmp_path: Path, variables: Mapping[str, Sequence[Any]]
) -> None:
    variables = {**variables, "seed": [0, 1]}
    base = dict.fromkeys(variables["model"], 0.3) if "model" in variables else 0.3
    samples = make_results(tmp_path, variables, lambda settings: 0.6, base_chance=base)
    names = [file.parent.name for file in tmp_path.glob("*/manifest.json")]
    scores = SampleScores(samples)
    table = make_table(tmp_path, names, [*variables], scores, 0.95)
    plot, *_ = draw_metric(aggregate(table, [*variables], scores, 0.95), table, [*variables], TASK, METRIC)
    assert plot.caption.endswith(" Small circles are single trainings.")
    circles = [
        layer["data"]["name"]
        for layer in plot.spec["layer"]
        if isinstance(layer["mark"], dict) and layer["mark"].get("size") == 25
    ]
    drawn = plot.spec["datasets"][circles[0]]
    assert len(drawn) == 4
    assert not any("baseline" in row["setting"] for row in drawn)


def test_an_existing_adapter_on_a_model_is_only_in_the_list(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 8], "model": ["small", "large"]}
    samples = make_results(tmp_path, variables, lambda settings: 0.5)
    settings = {"adapter": "a", "model": "small", "mode": "B1"}
    rows = make_point(tmp_path, "given", settings, samples["value"].head(100).to_numpy(), 0)
    scores = SampleScores(pd.concat([samples, pd.DataFrame(rows, columns=samples.columns)]))
    names = [*json.loads((tmp_path / "points.json").read_text()), "given"]
    table = make_table(tmp_path, names, [*variables], scores, 0.95)
    grid, listed = draw_metric(aggregate(table, [*variables], scores, 0.95), table, [*variables], TASK, METRIC)
    assert "Only in the table: 1 settings that are not trained." in grid.caption
    assert "given" not in json.dumps(grid.spec["datasets"])
    assert "given" in json.dumps(listed.spec["datasets"])


def test_a_gain_is_over_the_points_own_base_model(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 8], "model": ["small", "large"]}
    chances = {"small": 0.4, "large": 0.9}
    samples = make_results(
        tmp_path, variables, lambda settings: chances[settings["model"]], base_chance={"small": 0.1, "large": 0.85}
    )
    bases = {model: f"baseline__model={model}" for model in chances}
    scores = SampleScores(samples)
    table = make_table(
        tmp_path, [*bases.values(), *json.loads((tmp_path / "points.json").read_text())], [*variables], scores, 0.95
    )
    rows = table.set_index("point")
    settings = aggregate(table, [*variables], scores, 0.95).set_index("setting")
    for model, base in bases.items():
        assert rows.loc[base, "model"] == model
        assert pd.isna(rows.loc[base, f"{METRIC}:delta"])
        point = f"lora_rank=8__model={model}"
        gain = rows.loc[point, METRIC] - rows.loc[base, METRIC]
        assert rows.loc[point, f"{METRIC}:delta"] == pytest.approx(gain)
        assert settings.loc[point, f"{METRIC}:delta"] == pytest.approx(gain)
    found = answer(tmp_path, [*variables], samples)
    assert found.best is None or "model=large" in found.best
    collect(tmp_path, [*variables])
    plots = draw_metric(settings.reset_index(), table, [*variables], TASK, METRIC)
    drawn = json.dumps([plot.spec for plot in plots], ensure_ascii=False)
    assert all(base.replace("__", GAP) in drawn for base in bases.values())
