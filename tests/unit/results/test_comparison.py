"""Experiments are compared on what is the same task in all of them, and what is not comparable is told by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from rich.console import Console

from lorasweep.results.comparison import Comparison, compare, read_experiments, show_comparison
from lorasweep.results.comparison_page import make_page
from lorasweep.results.inference import PAIRED_WILSON, UNPAIRED, Scores, get_unpaired_p_value
from lorasweep.util.digest import digest_text
from lorasweep.util.errors import InputError
from made_results import METRIC, TASK, collect, make_results

RANKS = {"lora_rank": [4, 8]}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Make a finished experiment whose samples are right with a chance; `edit` changes its evaluations' record."""

    def make(
        name: str,
        chance: float = 0.5,
        edit: Callable[[dict[str, Any]], object] | None = None,
        variables: Any = RANKS,
        rename: str = "",
        **settings: Any,
    ) -> Path:
        results = tmp_path / name
        results.mkdir(parents=True)
        samples = make_results(results, variables, lambda values: chance + values["lora_rank"] / 100, **settings)
        samples.assign(sample=rename + samples["sample"]).to_parquet(results / "samples.parquet", index=False)
        for file in results.glob("*/manifest.json"):
            manifest = json.loads(file.read_text())
            if edit:
                edit(manifest["evaluation"]["spec"])
            file.write_text(json.dumps(manifest))
        collect(results, list(variables))
        return results

    return make


def compare_one(*folders: Path, **asked: Any) -> Comparison:
    [made] = compare(read_experiments(folders), asked.get("task"), asked.get("metric"))
    return made


def edit_experiment(results: Path, **sections: Any) -> None:
    file = results / "experiment.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | sections))


def test_settings_have_scores_and_gains_over_their_own_base(make: Callable[..., Path]) -> None:
    made = compare_one(make("low", 0.3, base_chance=0.2), make("high", 0.8, base_chance=0.5))
    assert (made.task, made.metric) == (TASK, METRIC)
    rows = made.rows.set_index(["experiment", "setting"])
    assert list(rows.index) == [
        (name, setting) for name in ("low", "high") for setting in ("baseline", "lora_rank=4", "lora_rank=8")
    ]
    for name in ("low", "high"):
        own = rows.loc[(name, "lora_rank=8")]
        assert own[f"{METRIC}:delta"] == pytest.approx(own[METRIC] - rows.loc[(name, "baseline"), METRIC])
        assert own[f"{METRIC}:low"] < own[METRIC] < own[f"{METRIC}:high"]
    assert made.variables == ("lora_rank",)
    assert list(rows["lora_rank"].dropna()) == [4, 8, 4, 8]


def test_the_best_of_each_are_paired_by_sample_and_the_choice_is_paid_for(make: Callable[..., Path]) -> None:
    made = compare_one(make("low", 0.3), make("high", 0.8))
    [pair] = made.pairs
    assert pair.experiments == ("low", "high")
    assert pair.settings == ("lora_rank=8", "lora_rank=8")
    assert pair.difference.pairs == 40
    assert pair.difference.interval is not None
    assert pair.difference.interval.method == PAIRED_WILSON
    assert pair.difference.p_value is not None
    # Two settings of each: four pairs to choose from.
    assert pair.p_adjusted == pytest.approx(4 * pair.difference.p_value)
    assert pair.p_adjusted < 0.05
    assert made.sentences[0].startswith(f"{METRIC}: the best of low (lora_rank=8) differs from the best of high (lora_")
    assert "not significant" not in made.sentences[0]
    assert any("from 2 of low, 2 of high: p-values are corrected" in note for note in made.notes)


def test_a_tie_is_not_significant_and_three_experiments_are_three_pairs(make: Callable[..., Path]) -> None:
    made = compare_one(make("a"), make("b"), make("c", 0.9))
    assert [pair.experiments for pair in made.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert made.sentences[0].endswith("by +0.000 (-0.047 to +0.047), p = 1: not significant.")
    raw = [pair.difference.p_value or 0 for pair in made.pairs]
    # Holm: the smallest p-value counts three times.
    assert made.pairs[1].p_adjusted == pytest.approx(min(1, 3 * 4 * raw[1]))


def test_answers_without_a_score_are_told_of(make: Callable[..., Path]) -> None:
    folder = make("a")
    samples = pd.read_parquet(folder / "samples.parquet")
    unread = samples.index[samples["point"] == "lora_rank=8"][:3]
    samples.drop(unread).to_parquet(folder / "samples.parquet", index=False)
    collect(folder, list(RANKS))
    assert f"a: 3 answers have no score, and {METRIC} leaves them out." in compare_one(folder, make("b")).notes


def test_other_samples_of_the_same_task_are_compared_unpaired_and_marked(make: Callable[..., Path]) -> None:
    made = compare_one(make("a", 0.2), make("b", 0.9, rename="other "))
    [pair] = made.pairs
    assert pair.difference.pairs == 0
    assert pair.difference.interval is not None
    assert pair.difference.interval.method == UNPAIRED
    assert pair.p_adjusted is not None
    assert pair.p_adjusted < 0.05
    assert "a and b are compared unpaired: their samples differ (0 in both)." in made.notes


def test_without_scores_of_samples_several_seeds_are_compared(make: Callable[..., Path]) -> None:
    folders = [make(name, chance, variables=RANKS | {"seed": [0, 1, 2]}) for name, chance in (("a", 0.2), ("b", 0.8))]
    for folder in folders:
        (folder / "samples.parquet").unlink()
    [pair] = compare_one(*folders).pairs
    assert pair.difference.pairs == 0
    assert pair.difference.p_value is not None
    assert pair.difference.p_value < 0.01


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda spec: spec["files"].update({"tasks.py": "e" * 64}), "the file tasks.py differs between a and b"),
        (lambda spec: spec["tasks"][0].update(limit=20), "limit is not set in a, and 20 in b"),
        (
            lambda spec: spec["tasks"][0]["args"].update(size=3),
            "the argument size of the task is not set in a, and 3 in b",
        ),
        (lambda spec: spec["tasks"][0].update(scorer="includes"), 'scorer is not set in a, and "includes" in b'),
        (
            lambda spec: spec.update(model_roles={"grader": {"model": "hf/judge", "config": {}, "args": {}}}),
            "the model of the role grader is not set in a, and ",
        ),
    ],
)
def test_a_task_that_is_another_is_refused_by_what_differs(
    make: Callable[..., Path], edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    with pytest.raises(InputError, match=f"^letters is not the same task: {re.escape(said)}"):
        compare_one(make("a"), make("b", edit=edit))


def test_an_experiment_with_another_task_stands_apart_and_the_others_are_compared(make: Callable[..., Path]) -> None:
    other = make("other", edit=lambda spec: spec["tasks"][0].update(limit=20))
    made = compare_one(make("a"), other, make("b"))
    assert [pair.experiments for pair in made.pairs] == [("a", "b")]
    assert made.apart == {"other": ["limit is not set in a, and 20 in other"]}
    assert set(made.rows["experiment"]) == {"a", "b"}


def test_a_task_elsewhere_on_disk_is_the_same_by_its_content(make: Callable[..., Path]) -> None:
    def move(spec: dict[str, Any]) -> None:
        spec["tasks"][0]["task"] = "elsewhere/tasks.py"
        spec["files"] = {"elsewhere/tasks.py": "d" * 64}

    moved = make("b", edit=move)
    edit_experiment(moved, evaluation={"tasks": ["elsewhere/tasks.py"]})
    assert len(compare_one(make("a"), moved).pairs) == 1


def test_a_data_file_that_a_task_reads_is_a_part_of_it(make: Callable[..., Path]) -> None:
    folders = []
    for name, digest in (("a", "1" * 64), ("b", "2" * 64)):
        folders.append(make(name, edit=lambda spec, digest=digest: spec["files"].update({"data/test.jsonl": digest})))
        edit_experiment(folders[-1], evaluation={"tasks": [{"task": "tasks.py@letters", "files": ["data/test.jsonl"]}]})
    with pytest.raises(InputError, match=r"^letters is not the same task: the file test\.jsonl differs"):
        compare_one(*folders)


def test_evaluations_that_differ_beside_the_task_are_noted(make: Callable[..., Path]) -> None:
    made = compare_one(make("a"), make("b", edit=lambda spec: spec.update(temperature=1)))
    assert "The evaluations differ in temperature: 0 in a, 1 in b." in made.notes
    digest = digest_text("{{ messages }}")[:12]
    made = compare_one(make("c"), make("d", edit=lambda spec: spec.update(chat_template="{{ messages }}")))
    assert f'The evaluations differ in chat_template: not set in c, "sha256 {digest}" in d.' in made.notes


def test_the_level_of_intervals_is_that_of_the_tables_whatever_the_experiment_says_now(
    make: Callable[..., Path],
) -> None:
    folders = [make("a"), make("b", 0.6)]
    before = compare_one(*folders)
    edit_experiment(folders[0], report={"confidence": 0.99})
    assert compare_one(*folders).confidence == before.confidence == 0.95


def test_points_of_one_experiment_that_differ_are_no_difference_to_another_that_has_the_same(
    make: Callable[..., Path],
) -> None:
    def make_of_two_models(name: str, dtypes: tuple[str, str]) -> Path:
        folder = make(name)
        for point, dtype in zip(sorted(folder.glob("*/manifest.json")), dtypes * 9, strict=False):
            record = json.loads(point.read_text())
            record["evaluation"]["spec"]["dtype"] = dtype
            point.write_text(json.dumps(record))
        return folder

    two, same, one = (
        make_of_two_models(n, d) for n, d in (("a", ("bf16", "fp32")), ("b", ("fp32", "bf16")), ("c", ("fp32", "fp32")))
    )
    assert not [note for note in compare_one(two, same).notes if "differ in dtype" in note]
    assert 'The evaluations differ in dtype: "bf16" and "fp32" in a, "fp32" in c.' in compare_one(two, one).notes


def test_what_cannot_be_compared_is_told(make: Callable[..., Path], tmp_path: Path) -> None:
    a, b = make("a"), make("b")
    for folders, said in (
        ([a], "one experiment cannot be compared"),
        ([a, a / "../a"], "this experiment is named twice"),
        ([a, a / "plots"], "not an experiment of lorasweep: it has no experiment.yaml"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            read_experiments(folders)
    with pytest.raises(
        InputError, match=r"--task: 'leters' is no common task \(did you mean 'letters'\?\): a has letters"
    ):
        compare_one(a, b, task="leters")
    with pytest.raises(InputError, match=r"--metric: 'f1' is no common metric on letters\. Expected: match/accuracy"):
        compare_one(a, b, metric="f1")
    table = pd.read_parquet(b / "results.parquet").assign(task="words")
    table.to_parquet(b / "results.parquet")
    with pytest.raises(InputError, match="no task in common: a has letters; b has words"):
        compare_one(a, b)
    (b / "results.parquet").unlink()
    with pytest.raises(InputError, match=r"b: no table of results yet \(results.parquet is missing\)"):
        read_experiments([a, b])


def test_every_common_task_is_compared_and_a_metric_or_a_task_chooses(make: Callable[..., Path]) -> None:
    folders = make("a"), make("b", 0.8)
    for folder in folders:
        for file in folder.glob("*/manifest.json"):
            manifest = json.loads(file.read_text())
            evaluation = manifest["evaluation"]
            evaluation["tasks"]["words"] = {"scores": {"f1/all": 0.5}, "samples": 10}
            evaluation["spec"]["tasks"].append({"name": "words", "task": "tasks.py@words", "args": {}, "limit": None})
            file.write_text(json.dumps(manifest))
        edit_experiment(folder, evaluation={"tasks": ["tasks.py@letters", "tasks.py@words"]})
        collect(folder, ["lora_rank"])
    experiments = read_experiments(folders)
    assert [(made.task, made.metric) for made in compare(experiments, None, None)] == [
        (TASK, METRIC),
        ("words", "f1/all"),
    ]
    assert [made.task for made in compare(experiments, None, "f1/all")] == ["words"]
    [words] = compare(experiments, "words", None)
    assert words.pairs[0].p_adjusted is None
    assert words.sentences[0].endswith("which cannot be tested.")
    assert "a and b are compared unpaired: there are no scores of their samples." in words.notes


def test_a_manifest_that_does_not_say_how_it_was_evaluated_is_told(make: Callable[..., Path]) -> None:
    a, b = make("a"), make("b")
    for file in b.glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        del manifest["evaluation"]["spec"]
        file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json: does not say how the point was evaluated"):
        compare_one(a, b)


def test_folders_of_one_name_are_told_apart_by_their_parents(make: Callable[..., Path]) -> None:
    folders = make("one/results/sweep"), make("two/results/sweep")
    assert [e.name for e in read_experiments(folders)] == ["one/results/sweep", "two/results/sweep"]


def test_the_terminal_and_the_page_show_every_setting(make: Callable[..., Path], tmp_path: Path) -> None:
    folders = [make("low", 0.3), make("high", 0.8)]
    edit_experiment(folders[1], model={"path": "other-model"})
    experiments = read_experiments(folders)
    comparisons = compare(experiments, None, None)
    console = Console(width=120, record=True)
    show_comparison(comparisons[0], console)
    said = console.export_text()
    for name in ("low/baseline", "low/lora_rank=8", "high/lora_rank=4"):
        assert name in said
    assert re.search(r"high/lora_rank=8 +B1 +0\.\d+ \[0\.\d+, [01]\.\d+\] +\+0\.\d+ \[\+0\.\d+, \+0\.\d+\] +8", said)
    page = tmp_path / "page.html"
    make_page(experiments, comparisons, page)
    text = page.read_text()
    assert "<td>model.path</td><td>model</td><td>other-model</td>" in text
    assert "40, paired" in text
    assert not re.search(r"(?:src|href)=[\"']?https?:", text)


def test_clusters_of_one_experiment_are_none_of_two(make: Callable[..., Path]) -> None:
    folders = make("clustered"), make("plain", rename="other ")
    samples = pd.read_parquet(folders[0] / "samples.parquet")
    samples.assign(cluster=samples["sample"].str[:2]).to_parquet(folders[0] / "samples.parquet", index=False)
    [pair] = compare_one(*folders).pairs
    assert pair.difference.interval
    assert pair.difference.pairs == 0


def test_two_tasks_of_one_name_have_each_its_plot(make: Callable[..., Path], tmp_path: Path) -> None:
    def is_other(spec: dict[str, Any]) -> None:
        spec["tasks"][0]["limit"] = 7

    experiments = read_experiments([make("a"), make("b"), make("c", edit=is_other), make("d", edit=is_other)])
    made = compare(experiments, None, None)
    assert len(made) == 2
    make_page(experiments, made, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for number, names in ((1, {"a", "b"}), (2, {"c", "d"})):
        assert page.count(f'data-plot="compared-{number}"') == 1
        assert set(made[number - 1].rows["experiment"]) == names


def test_an_unpaired_test_knows_binary_scores_and_others() -> None:
    def score(values: Any) -> Scores:
        return Scores(np.asarray(values, float)[None], tuple(map(str, range(len(values)))))

    zeros, ones = score(np.zeros(10)), score(np.ones(10))
    # Of 20 in two rows of ten, one table in C(20, 10) is as extreme to each side.
    assert get_unpaired_p_value(zeros, ones) == pytest.approx(2 / 184756)
    assert get_unpaired_p_value(zeros, zeros) == 1
    draw = np.random.default_rng(0)
    assert (get_unpaired_p_value(score(draw.normal(0, 1, 30)), score(draw.normal(2, 1, 40))) or 1) < 1e-6
    assert get_unpaired_p_value(score([0.5]), score([0.5, 0.5])) is None
