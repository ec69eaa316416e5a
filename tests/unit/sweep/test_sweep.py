"""The sweep as an object: which points, files, texts and requests follow from an experiment."""

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import yaml

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.points import record_points
from lorasweep.sweep.batches import record_batches
from lorasweep.sweep.checks import warn_of_prompts
from lorasweep.sweep.sweep import MISSING_MODEL_AMOUNT, Sweep
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from plain_checkpoint import write_checkpoint

SETS: dict[str, Any] = {
    "data": {
        "train": "train.jsonl",
        "sets": {
            "short": {"max_samples": 10, "system_prompt": "Short."},
            "long": {"train": "long.jsonl", "format": "chat", "validation": "long.jsonl"},
        },
    }
}
"""Two sets of data; `write_sets` writes the files."""

ASKED = {"evaluation": {"merge_adapters": False}}


def write_sets() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("long.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 60)
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))


MODES = [
    {"name": "full", "model_format": "hf"},
    {"name": "merged", "merge_adapters": True},
    {"name": "direct", "merge_adapters": False},
]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    samples = [{"input": f"after {a}", "output": b} for a, b in pairwise(ascii_lowercase)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (tmp_path / "tasks.py").write_text("@task\ndef letters():\n    pass\n")

    def load(is_job: bool = False, shared_gpus: int | None = None, **sections: Any) -> Sweep:
        config = {
            "experiment": {"name": "mine"},
            "model": {"path": "model", "device": "cpu"},
            "data": {"train": "train.jsonl"},
            **sections,
        }
        config["evaluation"] = {"tasks": ["tasks.py@letters"], **sections.get("evaluation", {})}
        return Sweep.load(config, "mine.yaml", is_job=is_job, shared_gpus=shared_gpus)

    return load


def test_each_mode_keeps_its_files(load: Callable[..., Sweep]) -> None:
    sweep = load(runs=MODES)
    kept = {point: set(sweep.get_kept_files(point)) for point in sweep.folders}
    adapter = {"recipe", "adapter", "metrics"}
    assert kept == {
        "full": {*adapter, "model"},
        "merged": adapter,
        "direct": adapter,
        "baseline": {"metrics"},
    }
    assert sweep.evaluated == {"full": "A", "merged": "B1", "direct": "B2", "baseline": "base"}


def test_each_model_has_its_own_baseline_batches_identity_and_requests(
    load: Callable[..., Sweep], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "wider", hidden_size=32)
    Path("more.py").write_text("@task\ndef more():\n    pass\n")
    sections: dict[str, Any] = {
        "model": {"device": "cpu"},
        "models": {"small": {"path": "model"}, "wider": {"path": "wider", "dtype": "fp32"}},
        "variables": {"model": ["small", "wider"], "lora_rank": [4, 8]},
        "evaluation": {
            "merge_adapters": False,
            "tasks": ["tasks.py@letters", {"task": "more.py@more", "when": "model == 'small'"}],
        },
    }
    sweep = load(**sections)
    sweep.check(asks_inspect=False)
    prints = {name: read_checkpoint(tmp_path / name).fingerprint for name in ("model", "wider")}
    small, wider = "lora_rank=4__model=small", "lora_rank=4__model=wider"
    bases = ["baseline__model=small", "baseline__model=wider"]
    assert list(sweep.baselines) == bases
    assert [sweep.get_fingerprint(name) for name in (small, wider, *bases)] == [*prints.values(), *prints.values()]
    assert [sweep.get_evaluation_spec(name).dtype for name in (small, wider, *bases)] == ["bf16", "fp32"] * 2
    # A base model is asked what its points are asked.
    assert [sweep.get_task_names(name) for name in bases] == [["letters", "more"], ["letters"]]
    assert {frozenset(sweep.get_model(point).path for point in b) for b in sweep.batches.values()} == {
        frozenset(["model"]),
        frozenset(["wider"]),
    }
    trainings = {sweep.points[point].training for point in (small, wider)}
    assert len(trainings) == 2
    assert "  checkpoint_dir: wider\n" in sweep.get_recipe(str(sweep.points[wider].training))
    for rule, of in (("merge", (small, wider)), ("evaluate", bases)):
        assert sweep.request(rule, "mem_mb", of[0]) <= sweep.request(rule, "mem_mb", of[1])
    assert sweep.request("merge", "disk_mb", small) <= sweep.request("merge", "disk_mb", wider)
    record_points(sweep.points, sweep.results / "points.json")
    record_batches(sweep.batches, sweep.results / "batches.json")
    job = load(is_job=True, **sections)
    for name in (*sweep.folders, *sweep.batches):
        point = sweep.batches[name][0] if name in sweep.batches else name
        assert job.get_evaluation_spec(point) == sweep.get_evaluation_spec(point)
        assert job.get_model(name) == sweep.get_model(name)
    # Points stay in the order of the record, whatever that of the file is.
    sections["variables"]["model"].reverse()
    again = load(**sections)
    assert again.summary_settings == sweep.summary_settings == job.summary_settings


def test_a_model_that_is_not_quantized_has_a_full_baseline(load: Callable[..., Sweep]) -> None:
    models = {"small": {"path": "model", "quantize": "nf4", "trainer": "trl"}, "other": {"path": "model"}}
    runs = [{"name": "quantized", "model": "small"}, {"name": "full", "model": "other", "base": "full"}]
    evaluation = {"base": "quantized", "merge_adapters": False}
    sweep = load(models=models, runs=runs, evaluation=evaluation)
    sweep.check(asks_inspect=False)
    for name, base in (("small", "quantized"), ("other", "full")):
        assert sweep.get_plain_settings(f"baseline__model={name}")["base"] == base
    sweep = load(models=models, runs=[runs[0], {"name": "wrong", "model": "other"}], evaluation=evaluation)
    with pytest.raises(InputError, match=r"\(point 'wrong'\) does not go without models\.other\.quantize"):
        sweep.check(asks_inspect=False)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"quantize": "nf4"}, r"models\.wrong\.quantize: 'nf4' is invalid with trainer: torchtune"),
        ({"path": "empty"}, r"models\.wrong\.path: 'empty' has no config\.json"),
    ],
)
def test_a_fault_of_a_model_is_told_with_its_name(load: Callable[..., Sweep], own: dict[str, Any], said: str) -> None:
    Path("empty").mkdir()
    models = {"right": {"path": "model"}, "wrong": {"path": "model", **own}}
    with pytest.raises(InputError, match=f"^mine\\.yaml: {said}"):
        load(models=models, variables={"model": [*models]}).check(asks_inspect=False)


def test_an_unknown_trainer_of_a_model_is_named_by_its_key(load: Callable[..., Sweep]) -> None:
    with pytest.raises(InputError, match=r"^mine\.yaml: models\.small\.trainer: 'tlr' is not known .*'trl'"):
        load(models={"small": {"path": "model", "trainer": "tlr"}}, variables={"model": ["small"]})


@pytest.mark.parametrize("name", ["#6", "why?", "a%20b"])
def test_a_place_that_inspect_would_take_for_another_is_refused(
    load: Callable[..., Sweep], tmp_path: Path, name: str
) -> None:
    (tmp_path / "results").symlink_to(name)
    said = re.escape(f"mine.yaml: {tmp_path}/{name}/mine: the results cannot be here")
    with pytest.raises(InputError, match=said):
        load(variables={"lora_rank": [8]}).check(asks_inspect=False)
    load(variables={"lora_rank": [8]}, evaluation={"enabled": False}).check(asks_inspect=False)
    (tmp_path / "results").unlink()
    (tmp_path / "results").symlink_to("5% of [a] + b@c, ä")
    load(variables={"lora_rank": [8]}).check(asks_inspect=False)


def test_any_missing_model_is_named_by_its_key(load: Callable[..., Sweep]) -> None:
    models = {"small": {"path": "model"}, "none": {"path": "none"}}
    sweep = load(model={"device": "cpu"}, models=models, variables={"model": ["small", "none"]})
    assert "models.none.path: no such directory: 'none'" in str(sweep.missing_model)
    assert len(sweep.trainings) == 2


def test_a_point_is_evaluated_on_its_own_tasks_and_no_other_point_notices(load: Callable[..., Sweep]) -> None:
    Path("more.py").write_text("@task\ndef more():\n    pass\n")
    sections: dict[str, Any] = {
        "variables": {"lora_rank": [4, 8], "mode": ["A", "B2"]},
        "controls": {"epochs": 2},
        "evaluation": {"epochs": "all"},
    }
    plain = load(**sections)
    tasks = ["tasks.py@letters", {"task": "more.py@more", "when": "lora_rank == 8"}]
    sections["evaluation"] = sections["evaluation"] | {"tasks": tasks}
    sweep = load(**sections)
    record_points(sweep.points, sweep.results / "points.json")
    record_batches(sweep.batches, sweep.results / "batches.json")
    job = load(is_job=True, **sections)
    for name in sweep.folders:
        both = "lora_rank=8" in name or name == "baseline"
        assert sweep.get_task_names(name) == (["letters", "more"] if both else ["letters"])
        assert sweep.get_task_files(name) == (["more.py", "tasks.py"] if both else ["tasks.py"])
        spec = sweep.get_evaluation_spec(name)
        assert [task.name for task in spec.tasks] == sweep.get_task_names(name)
        assert list(spec.files) == sweep.get_task_files(name)
        assert (spec == plain.get_evaluation_spec(name)) is not both
        assert job.get_evaluation_spec(name) == spec
    batches = {frozenset(sweep.get_task_names(point) == ["letters"] for point in b) for b in sweep.batches.values()}
    assert batches == {frozenset([True]), frozenset([False])}
    for batch, points in sweep.batches.items():
        assert job.get_task_files(batch) == sweep.get_task_files(batch) == sweep.get_task_files(points[0])
    assert sweep.request("evaluate", "runtime", "baseline") > plain.request("evaluate", "runtime", "baseline")
    point = "lora_rank=4__mode=A"
    assert sweep.request("evaluate", "runtime", point) == plain.request("evaluate", "runtime", point)


@pytest.mark.parametrize("wanted", [set(), {"merged"}, {"full", "merged", "direct"}, {"baseline", "full"}])
def test_a_pattern_of_names_matches_those_that_are_wanted(load: Callable[..., Sweep], wanted: set[str]) -> None:
    sweep = load(runs=MODES)
    pattern = sweep.match_points(wanted.__contains__)
    # As Snakemake applies it: a name is followed by more of the path.
    matched = {
        name for name in sweep.folders if re.match(rf"(?P<point>{pattern})/manifest.json$", f"{name}/manifest.json")
    }
    assert matched == wanted


def test_what_a_point_is_not_is_no_part_of_its_settings(load: Callable[..., Sweep]) -> None:
    sweep = load(variables={"lora_rank": [4]}, evaluation={"baselines": [{"name": "theirs", "model": "model"}]})
    trained, base, other = (json.loads(sweep.get_settings(name)) for name in ("lora_rank=4", "baseline", "theirs"))
    assert trained["mode"] == "B1"
    assert trained["lora_rank"] == 4
    assert base == {"device": "cpu", "dtype": "bf16", "mode": "base"}
    assert other == {**base, "model": "model"}


def test_requests_grow_with_each_attempt_and_are_for_the_model_that_is_evaluated(load: Callable[..., Sweep]) -> None:
    sweep = load(runs=MODES, evaluation={"baselines": [{"name": "large", "model": "large"}]})
    write_checkpoint(Path("large"), hidden_size=4096, intermediate_size=8192)
    assert sweep.request("train", "mem_mb", "full", 2) == 2 * sweep.request("train", "mem_mb", "full")
    assert sweep.request("evaluate", "mem_mb", "large") > sweep.request("evaluate", "mem_mb", "baseline")


def test_without_the_model_a_dry_run_has_a_sweep(load: Callable[..., Sweep]) -> None:
    sweep = load(runs=MODES, model={"path": "none", "device": "cpu"})
    sweep.check(asks_inspect=False)
    assert "no such directory: 'none'" in str(sweep.missing_model)
    [training] = sweep.trainings
    assert sweep.get_recipe(training) == sweep.missing_model
    assert sweep.request("train", "mem_mb", "full") == MISSING_MODEL_AMOUNT
    assert list(sweep.batches.values()) == [["direct"]]


def test_a_job_has_the_batches_of_its_run(load: Callable[..., Sweep]) -> None:
    points = {"variables": {"seed": list(range(5))}, "evaluation": {"merge_adapters": False, "adapters_per_job": 2}}
    planned = load(**points)
    assert [len(batch) for batch in planned.batches.values()] == [2, 2, 1]
    record_points(planned.points, planned.results / "points.json")
    record_batches({"other": ["seed=0", "seed=4", "gone"]}, planned.results / "batches.json")
    job = load(is_job=True, **points)
    assert job.batches == {"other": ["seed=0", "seed=4"]}
    assert job.batch_of == {"seed=0": "other", "seed=4": "other"}


def test_a_job_has_the_sweep_as_its_run_has_it(load: Callable[..., Sweep]) -> None:
    sections: dict[str, Any] = {
        "variables": {"lora_rank": [4, 8], "mode": ["A", "B2"]},
        "runs": [{"name": "asked", "prompt": "Say {input}", "_override": {"optimizer": {"fused": False}}}],
        "controls": {"epochs": 3, "lora_alpha": 7.5, "lora_attn_modules": ["q_proj"]},
        "evaluation": {"epochs": [1, 3]},
    }
    _compare_job(load, sections)


def test_a_job_has_the_data_of_each_point(load: Callable[..., Sweep]) -> None:
    write_sets()
    job = _compare_job(load, {"variables": {"data": ["short", "long"], "max_samples": [20, None]}, **SETS, **ASKED})
    assert job.points["data=short__max_samples=null"].data.system_prompt == "Short."
    own = [{"name": "own", "train": ["long.jsonl", "train.jsonl"]}, {"name": "asked", "system_prompt": "Be brief."}]
    Path("long.jsonl").write_text(Path("train.jsonl").read_text() * 3)
    files = {"variables": {"train": ["train.jsonl", "long.jsonl"]}, "runs": own, "data": {"train": "train.jsonl"}}
    job = _compare_job(load, {**files, "evaluation": {"epochs": [1, 2]}, "controls": {"epochs": 2}})
    assert job.points["own"].settings["train"] == ["long.jsonl", "train.jsonl"]
    assert job.points["asked"].settings["train"] == "train.jsonl"


def _compare_job(load: Callable[..., Sweep], sections: dict[str, Any]) -> Sweep:
    """Check that a job of a sweep has what the process has that planned it; return the job's."""
    planned = load(**sections)
    record_points(planned.points, planned.results / "points.json")
    job = load(is_job=True, **sections)
    assert job.points.keys() == planned.points.keys()
    assert job.evaluated == planned.evaluated
    assert job.trainings.keys() == planned.trainings.keys()
    for training in planned.trainings:
        assert job.get_recipe(training) == planned.get_recipe(training)
        assert job.get_kept_epochs(training) == planned.get_kept_epochs(training)
        assert job.get_data_files(training) == planned.get_data_files(training)
        assert job.request("train", "mem_mb", training) == planned.request("train", "mem_mb", training)
        assert job.request("train", "runtime", training) == planned.request("train", "runtime", training)
    for name, point in planned.points.items():
        assert job.points[name].settings == point.settings
        assert job.points[name].data == point.data
        assert job.points[name].is_trained == point.is_trained
        assert job.get_settings(name) == planned.get_settings(name)
        assert job.get_evaluation_spec(name) == planned.get_evaluation_spec(name)
        assert job.get_kept_files(name) == planned.get_kept_files(name)
    return job


@pytest.mark.parametrize(
    ("section", "shared", "message"),
    [
        ("controls", 1, "controls.gpus: 2 is invalid with --resources gpu=1"),
        ("evaluation", 1, "evaluation.gpus: 2 is invalid with --resources gpu=1"),
        ("evaluation", 4, "--resources: gpu=4: jobs on one machine"),
        (None, 2, "--resources: gpu=2: jobs on one machine"),
    ],
)
def test_gpus_that_jobs_would_share_are_refused(
    load: Callable[..., Sweep], section: str | None, shared: int, message: str
) -> None:
    on_gpus = {"model": {"path": "model"}, "variables": {"seed": [1]}, **({section: {"gpus": 2}} if section else {})}
    with pytest.raises(InputError, match=re.escape(message)):
        load(shared_gpus=shared, **on_gpus).check(asks_inspect=False)


def test_a_training_on_a_shared_machine_has_all_of_its_gpus(load: Callable[..., Sweep]) -> None:
    sections = {"runs": [{"name": "one"}, {"name": "two", "gpus": 2}], "model": {"path": "model"}}
    cluster, machine = load(**sections), load(shared_gpus=2, **sections)
    assert [cluster.get_train_gpus(training) for training in cluster.trainings] == [1, 2]
    assert [machine.get_train_gpus(training) for training in machine.trainings] == [2, 2]
    assert (cluster.evaluation_gpus, machine.evaluation_gpus) == (1, 2)
    assert machine.get_model_gpus("one") == 1


def test_an_evaluation_asks_for_its_gpus_and_is_the_same_evaluation(load: Callable[..., Sweep]) -> None:
    sections = {"runs": MODES, "model": {"path": "model"}}
    one, three = (load(evaluation={"gpus": gpus}, **sections) for gpus in (1, 3))
    for name in one.evaluated:
        assert (one.get_evaluation_gpus(name), three.get_evaluation_gpus(name)) == (1, 3)
        assert three.get_evaluation_spec(name).model_dump_json() == one.get_evaluation_spec(name).model_dump_json()
    assert [three.get_train_gpus(training) for training in three.trainings] == [1]
    assert [load(shared_gpus=3, evaluation={"gpus": 3}, **sections).get_train_gpus(t) for t in three.trainings] == [3]
    assert load(evaluation={"gpus": "auto"}, runs=MODES).evaluation_gpus == 0  # on a CPU


def test_gpus_are_as_many_as_the_weights_of_each_model_need(load: Callable[..., Sweep], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "wider", hidden_size=32)
    sizes = {name: read_checkpoint(tmp_path / name).num_parameters * 2 for name in ("model", "wider")}
    mine = {"bf16_flops": 1e12, "fp32_flops": 1e12, "bandwidth": 1e12, "memory": float(sizes["wider"])}
    sections = {
        "runs": MODES,
        "model": {"path": "model"},
        "evaluation": {"gpus": "auto", "baselines": [{"name": "wider", "model": "wider"}]},
    }
    sweep = load(plan={"device": "mine", "devices": {"mine": mine}}, **sections)
    sweep.check(asks_inspect=False)
    assert (sweep.get_evaluation_gpus("wider"), sweep.evaluation_gpus, sweep.most_gpus) == (2, 1, 2)
    judged = load(
        plan={"device": "mine", "devices": {"mine": mine}},
        **sections | {"evaluation": {"gpus": "auto", "model_roles": {"grader": "hf/wider"}}},
    )
    assert judged.evaluation_gpus == 4  # whose files are in fp32
    other = {"model": "hf/wider", "config": {"max_tokens": 8}}
    roles = {"grader": "hf/wider", "critic": "hf/wider", "strict": other}
    sections["evaluation"] = {"gpus": "auto", "model_roles": roles}
    twice = load(plan={"device": "mine", "devices": {"mine": mine}}, **sections)
    assert twice.evaluation_gpus == 6  # the same settings share a model
    del mine["memory"]
    without = load(plan={"device": "mine", "devices": {"mine": mine}}, **sections)
    with pytest.raises(InputError, match=r"evaluation\.gpus: 'auto' needs the memory .* plan\.devices\.mine\.memory"):
        without.check(asks_inspect=False)


BAD_GPUS = [
    ({"gpus": 2}, "cpu", "evaluation.gpus: 2 is invalid with model.device: cpu. Expected: 1, or cuda"),
    (
        {"gpus": 3, "backend": "vllm", "merge_adapters": False},
        "cuda",
        "evaluation.gpus: 3 is invalid: vLLM cannot split the heads of 'model' over so many. Expected: 1, 2",
    ),
]


@pytest.mark.parametrize(("evaluation", "device", "message"), BAD_GPUS)
def test_gpus_that_cannot_hold_a_model_are_refused(
    load: Callable[..., Sweep], evaluation: dict[str, Any], device: str, message: str
) -> None:
    sweep = load(evaluation=evaluation, model={"path": "model", "device": device}, variables={"seed": [1]})
    with pytest.raises(InputError, match=re.escape(message)):
        sweep.check(asks_inspect=False)


def test_a_judge_is_a_part_of_the_evaluation_with_its_weights(load: Callable[..., Sweep], tmp_path: Path) -> None:
    def make(**evaluation: Any) -> Sweep:
        return load(runs=MODES, evaluation=evaluation)

    plain = make()
    assert not {"model_roles", "gpus"} & {*json.loads(plain.get_evaluation_spec("merged").model_dump_json())}
    for name in ("judge", "stricter"):
        write_checkpoint(tmp_path / name, vocab_size={"judge": 4000, "stricter": 5000}[name])
    sweeps = [
        plain,
        make(model_roles={"grader": "hf/judge"}),
        make(model_roles={"grader": "hf/stricter"}),
        make(model_roles={"grader": {"model": "hf/judge", "config": {"max_tokens": 8}}}),
        make(model_roles={"critic": "hf/judge"}),
        make(model_roles={"grader": "openai/gpt-4o"}, allow_network=True),
    ]
    for name in plain.evaluated:
        assert len({sweep.get_evaluation_spec(name).sha256 for sweep in sweeps}) == len(sweeps)
    said = json.loads(sweeps[1].get_evaluation_spec("merged").model_dump_json())["model_roles"]["grader"]
    assert said == {
        "model": "hf/judge",
        "config": {},
        "args": {},
        "fingerprint": read_checkpoint(Path("judge")).fingerprint,
    }
    allowed = make(model_roles={"grader": "hf/judge"}, allow_network=True)
    assert allowed.get_evaluation_spec("merged") == sweeps[1].get_evaluation_spec("merged")
    more = 1.5 * sum(tensor.size for tensor in read_checkpoint(Path("judge")).tensors.values()) / 1e6
    for rule, point in (("evaluate", "baseline"), ("evaluate", "merged")):
        own, judged = (sweep.request(rule, "mem_mb", point) for sweep in sweeps[:2])
        assert own + more <= judged < own + more + 1
    assert sweeps[1].request("merge", "mem_mb", "full") == plain.request("merge", "mem_mb", "full")


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("hf/none", "evaluation.model_roles.grader: no such directory: 'none'"),
        (
            {"model": "lorasweep/judge", "args": {"base": "model", "adapter": "none"}},
            "evaluation.model_roles.grader.args.adapter: no adapter_model.safetensors in 'none'",
        ),
    ],
)
def test_a_judge_that_is_not_there_is_missed_before_any_job(
    load: Callable[..., Sweep], grader: Any, message: str
) -> None:
    sweep = load(runs=MODES, evaluation={"model_roles": {"grader": grader}})
    with pytest.raises(InputError, match=re.escape(message)):
        sweep.check(asks_inspect=False)


def test_a_model_is_asked_as_the_datas_format_says(load: Callable[..., Sweep], tmp_path: Path) -> None:
    rows = {
        "alpaca": {"instruction": "a", "input": "b", "output": "c"},
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "completion": {"text": "a"},
    }
    (tmp_path / "model/tokenizer_config.json").write_text('{"chat_template": "a"}')
    for format, row in rows.items():
        (tmp_path / format).write_text(json.dumps(row) + "\n")
        data = {"train": format, "format": format, **({"prompt": "Say {input}"} if format == "alpaca" else {})}
        sweep = load(variables={"seed": [0]}, data=data, controls={"batch_size": 1})
        sweep.check(asks_inspect=False)
        spec = sweep.get_evaluation_spec("seed=0")
        assert (spec.prompt, spec.has_plain_prompts) == (data.get("prompt"), True if format == "completion" else None)
    sweep = load(variables={"seed": [0]}, data={"train": "sharegpt", "format": "sharegpt", "prompt": "Say {input}"})
    with pytest.raises(InputError, match=r"data\.prompt: 'Say \{input\}' does not go with data\.format: sharegpt"):
        sweep.check(asks_inspect=False)


def test_a_recipe_has_the_digest_of_each_file(load: Callable[..., Sweep], tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("input,output\na,b\n")
    data = {"train": ["train.jsonl", "more.csv"], "validation": "more.csv"}
    sweep = load(variables={"seed": [0]}, data=data)
    sweep.check(asks_inspect=False)
    assert sweep.count_samples("seed=0") == 26
    first, more = (digest_file(tmp_path / name) for name in ("train.jsonl", "more.csv"))
    [training] = sweep.trainings
    recipe = sweep.get_recipe(training)
    assert f"# training data sha256: {first} {more}\n# validation data sha256: {more}\n" in recipe
    assert yaml.safe_load(recipe)["dataset"]["data_files"] == ["train.jsonl", "more.csv"]
    other = load(variables={"seed": [0]}, data={**data, "train": ["more.csv", "train.jsonl"]})
    assert other.trainings.keys() != sweep.trainings.keys()


class TestData:
    """Points with data of their own."""

    def test_each_is_trained_on_its_own_and_asks_for_what_that_needs(self, load: Callable[..., Sweep]) -> None:
        write_sets()
        sections = {"variables": {"data": ["short", "long"]}, "controls": {"max_seq_len": 10**7}}
        sweep = load(**SETS, **sections)
        sweep.check(asks_inspect=False)
        assert {name: sweep.count_samples(name) for name in sweep.points} == {"data=short": 10, "data=long": 60}
        trainings = {point: training for training, point in sweep.trainings.items()}
        short, long = trainings["data=short"], trainings["data=long"]
        assert [sweep.get_data_files(name) for name in (short, long)] == [["train.jsonl"], ["long.jsonl"] * 2]
        first, second = (digest_file(Path(name)) for name in ("train.jsonl", "long.jsonl"))
        assert sweep.get_recipe(short).count(f"data sha256: {first}\n") == 1
        assert sweep.get_recipe(long).count(f"data sha256: {second}\n") == 2
        dataset = yaml.safe_load(sweep.get_recipe(short))["dataset"]
        assert (dataset["data_files"], dataset["max_samples"]) == ("train.jsonl", 10)
        assert yaml.safe_load(sweep.get_recipe(long))["dataset"]["format"] == "chat"
        runtime = {name: sweep.request("train", "runtime", name) for name in (short, long)}
        assert runtime[long] > runtime[short]
        Path("long.jsonl").write_text(Path("long.jsonl").read_text() * 1000)
        memory = {name: sweep.request("train", "mem_mb", name) for name in (short, long)}
        assert memory[long] > memory[short]

    def test_what_changes_in_one_set_is_another_training_of_its_points_alone(self, load: Callable[..., Sweep]) -> None:
        write_sets()
        variables = {"data": ["short", "long"], "seed": [0, 1]}

        def identify(**changes: Any) -> dict[str, str]:
            sets = {name: {**part, **changes.get(name, {})} for name, part in SETS["data"]["sets"].items()}
            sweep = load(variables=variables, data={**SETS["data"], "sets": sets})
            return {name: sweep.identify_training(point) for name, point in sweep.points.items()}

        before = identify()
        more = identify(short={"max_samples": 11})
        assert {name for name in before if more[name] != before[name]} == {"data=short__seed=0", "data=short__seed=1"}
        Path("other").mkdir()
        Path("long.jsonl").rename("other/more.jsonl")
        assert identify(long={"train": "other/more.jsonl", "validation": "other/more.jsonl"}) == before
        with Path("other/more.jsonl").open("a") as file:
            file.write(Path("other/more.jsonl").read_text().splitlines()[0])
        edited = identify(long={"train": "other/more.jsonl", "validation": "other/more.jsonl"})
        assert {name for name in before if edited[name] != before[name]} == {"data=long__seed=0", "data=long__seed=1"}

    def test_the_same_data_by_two_names_are_one_training(self, load: Callable[..., Sweep]) -> None:
        Path("copy.jsonl").write_bytes(Path("train.jsonl").read_bytes())
        sets = {"one": {"train": "train.jsonl"}, "other": {"train": "copy.jsonl"}}
        sweep = load(variables={"data": ["one", "other"]}, data={"sets": sets})
        assert len(sweep.points) == 2
        assert len(sweep.trainings) == 1

    def test_what_is_asked_alike_is_evaluated_alike_in_one_batch(self, load: Callable[..., Sweep]) -> None:
        Path("copy.jsonl").write_bytes(Path("train.jsonl").read_bytes())
        sizes = load(variables={"max_samples": [5, 10, None], "train": ["train.jsonl", "copy.jsonl"]}, **ASKED)
        assert [len(batch) for batch in sizes.batches.values()] == [6]
        assert len({sizes.get_evaluation_spec(name).sha256 for name in sizes.points}) == 1
        write_sets()
        asked = load(variables={"data": ["short", "long"], "seed": [0, 1]}, **SETS, **ASKED)
        assert sorted(map(sorted, asked.batches.values())) == [
            ["data=long__seed=0", "data=long__seed=1"],
            ["data=short__seed=0", "data=short__seed=1"],
        ]
        assert asked.get_evaluation_spec("data=short__seed=0").system_prompt == "Short."

    @pytest.mark.parametrize(
        ("sections", "message"),
        [
            (
                {"variables": {"train": ["train.jsonl", "none.jsonl"]}},
                "mine.yaml: train (point 'train=none.jsonl'): no such file: none.jsonl",
            ),
            (
                {"variables": {"data": ["a"]}, "data": {"sets": {"a": {"train": "none.jsonl"}}}},
                "mine.yaml: data.sets.a.train (point 'data=a'): no such file: none.jsonl",
            ),
            (
                {"variables": {"data": ["a"]}, "data": {"train": "train.jsonl", "sets": {"a": {"format": "chat"}}}},
                "data.train (point 'data=a'): train.jsonl:1: no column 'messages' (data.messages_column)",
            ),
            (
                {"runs": [{"name": "held", "validation": "broken.jsonl"}]},
                "validation (point 'held'): broken.jsonl:2: not JSON",
            ),
            (
                {"variables": {"max_samples": [None, 1]}},
                "(point 'max_samples=1') gives no optimizer step with 1 samples",
            ),
            (
                {"variables": {"max_samples": [5, 1000]}},
                "max_samples: 1000 (point 'max_samples=1000') is invalid: there are ",
            ),
            (
                {"runs": [{"name": "plain", "format": "completion", "system_prompt": "Hm"}]},
                "data.system_prompt: 'Hm' (point 'plain') does not go with data.format: completion",
            ),
            (
                {"runs": [{"name": "a"}, {"name": "b", "format": "chat", "train": "chat.jsonl"}]},
                "has no chat template, but data.format: chat (point 'b') needs one",
            ),
        ],
    )
    def test_what_is_wrong_with_one_points_data_is_told_with_its_place(
        self, load: Callable[..., Sweep], sections: dict[str, Any], message: str
    ) -> None:
        Path("broken.jsonl").write_text('{"input": "a", "output": "b"}\nno\n')
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        Path("chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 2)
        write_checkpoint(Path("bare"), chat_template=False)
        with pytest.raises(InputError, match=re.escape(message)):
            load(**sections, model={"path": "bare", "device": "cpu"}).check(asks_inspect=False)


def test_a_given_chat_template_is_part_of_a_training_by_its_text_and_of_no_training_on_plain_text(
    load: Callable[..., Sweep], tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 9)
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    sets = {"chat": {}, "text": {"train": "text.jsonl", "format": "completion"}}
    sections: dict[str, Any] = {"data": {"train": "train.jsonl", "sets": sets}, "variables": {"data": [*sets]}}

    def identify(file: str | None) -> dict[str, str]:
        model = {"path": "model", "device": "cpu", **({"chat_template": file} if file else {})}
        sweep = load(model=model, **sections)
        sweep.check(asks_inspect=False)
        return {name: sweep.identify_training(point) for name, point in sweep.points.items()}

    without, first = identify(None), identify("own.jinja")
    shutil.move(tmp_path / "own.jinja", tmp_path / "moved.jinja")
    assert identify("moved.jinja") == first
    (tmp_path / "moved.jinja").write_text("{{ messages[-1].content }}")
    edited = identify("moved.jinja")
    chat, text = "data=chat", "data=text"
    assert len({without[chat], first[chat], edited[chat]}) == 3
    assert without[text] == first[text] == edited[text]


def test_a_given_chat_template_is_what_is_checked(load: Callable[..., Sweep], tmp_path: Path) -> None:
    (tmp_path / "model/tokenizer_config.json").write_text("{}")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 9)
    (tmp_path / "own.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('Nobody.') }}{% endif %}{{ messages }}"
    )
    model = {"path": "model", "device": "cpu", "chat_template": "own.jinja"}
    data = {"train": "chat.jsonl", "format": "chat"}
    sweep = load(variables={"seed": [0]}, data=data, model=model)
    sweep.check(asks_inspect=False)
    assert warn_of_prompts(sweep.experiment, sweep.points.values()) == []
    sweep = load(variables={"seed": [0]}, data={**data, "system_prompt": "Briefly."}, model=model)
    with pytest.raises(InputError, match=r"data\.system_prompt: the chat template of 'own\.jinja' refuses a system"):
        sweep.check(asks_inspect=False)


def test_an_existing_adapter_with_another_chat_template_than_it_is_asked_by_is_warned_of(
    load: Callable[..., Sweep],
) -> None:
    adapter = Path("theirs")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    runs = [{"name": name, "adapter": "theirs", "merge_adapters": name == "merged"} for name in ("merged", "direct")]

    def warn(**sections: Any) -> list[str]:
        sweep = load(runs=runs, **sections)
        return warn_of_prompts(sweep.experiment, sweep.points.values())

    assert warn() == []
    (adapter / "chat_template.jinja").write_text("{{ messages }}")  # as the model's
    assert warn() == []
    (adapter / "chat_template.jinja").write_text("{{ messages[0].content }}")
    [said] = warn()
    assert said.startswith("theirs: has another chat template than the one by which it is asked")
    assert said.endswith("model.chat_template, a file such as theirs/chat_template.jinja.")
    assert warn(model={"path": "model", "device": "cpu", "chat_template": "theirs/chat_template.jinja"}) == []
    assert warn(data={"format": "completion"}) == []


@pytest.mark.parametrize(
    ("sections", "is_refused"),
    [
        ({}, True),
        ({"evaluation": {"enabled": False}}, False),
        ({"evaluation": {"enabled": False}, "trainer": "trl"}, True),
    ],
)
def test_a_tokenizer_that_evaluation_cannot_read_is_refused_where_it_is_read(
    load: Callable[..., Sweep], sections: dict[str, Any], is_refused: bool
) -> None:
    write_checkpoint(Path("pieces"))
    Path("pieces/tokenizer.json").rename("pieces/tokenizer.model")
    Path("pieces/tokenizer.model").write_bytes(b"\n\x0e")
    sweep = load(variables={"seed": [0]}, model={"path": "pieces", "device": "cpu"}, **sections)
    if not is_refused:
        sweep.check(asks_inspect=False)
        return
    with pytest.raises(InputError, match=r"model\.path: 'pieces' has its tokenizer as tokenizer\.model alone"):
        sweep.check(asks_inspect=False)


def test_a_template_that_teaches_a_think_block_is_noted(load: Callable[..., Sweep], tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "chat_templates/qwen_3.jinja", tmp_path / "own.jinja")
    sweep = load(variables={"seed": [0]}, model={"path": "model", "device": "cpu", "chat_template": "own.jinja"})
    (note,) = warn_of_prompts(sweep.experiment, sweep.points.values())
    assert note.startswith("own.jinja: the chat template writes an empty <think> block before an answer")
    assert warn_of_prompts(sweep.experiment, []) == []  # nothing is trained


@pytest.mark.parametrize(
    ("shared", "own", "said"),
    [
        ({}, {"dtype": "fp16"}, "models.mine.dtype: 'fp16' is invalid: torchtune does not train in fp16"),
        ({"dtype": "fp16"}, {}, "models.mine: model.dtype: 'fp16' is invalid: torchtune does not train in fp16"),
    ],
)
def test_what_a_trainer_refuses_of_a_named_model_is_told_by_the_key_that_the_experiment_has(
    load: Callable[..., Sweep], shared: dict[str, str], own: dict[str, str], said: str
) -> None:
    models = {"mine": {"path": "model", **own}}
    sweep = load(variables={"model": ["mine"]}, model={"device": "cpu", **shared}, models=models)
    with pytest.raises(InputError, match=rf"^mine\.yaml: {re.escape(said)}"):
        sweep.check(asks_inspect=False)


@pytest.mark.parametrize(
    ("shared", "own", "key"),
    [
        ({}, {"chat_template": "bad.jinja"}, "models.mine.chat_template"),
        ({"chat_template": "bad.jinja"}, {}, "model.chat_template"),
    ],
)
def test_a_given_chat_template_of_a_named_model_is_refused_by_the_key_that_names_it(
    load: Callable[..., Sweep], shared: dict[str, str], own: dict[str, str], key: str
) -> None:
    Path("bad.jinja").write_text("{{")
    models = {"mine": {"path": "model", **own}}
    sweep = load(variables={"model": ["mine"]}, model={"device": "cpu", **shared}, models=models)
    with pytest.raises(InputError, match=rf"^mine\.yaml: {re.escape(key)}: 'bad\.jinja' is no template"):
        sweep.check(asks_inspect=False)


CHOSEN: dict[str, Any] = {
    "variables": {"lora_rank": [4], "mode": ["A", "B2"]},
    "controls": {"epochs": 3},
    "evaluation": {"epochs": "best", "validation_task": {"task": "tasks.py@letters", "name": "dev", "limit": 5}},
}


class TestChosenEpoch:
    """A task chooses the epoch of each training."""

    @pytest.fixture
    def load_chosen(self, load: Callable[..., Sweep]) -> Callable[..., Sweep]:
        Path("tasks.py").write_text("@task\ndef letters(size=2):\n    pass\n")

        def load_chosen(evaluation: dict[str, Any] | None = None, **dev: Any) -> Sweep:
            chosen = CHOSEN["evaluation"]
            dev = {**chosen["validation_task"], "args": {"size": 1}, **dev}
            return load(**{**CHOSEN, "evaluation": {**chosen, "validation_task": dev, **(evaluation or {})}})

        return load_chosen

    def test_its_training_publishes_all_epochs_and_points_take_what_is_chosen(
        self, load_chosen: Callable[..., Sweep]
    ) -> None:
        sweep = load_chosen()
        [training] = sweep.trainings
        assert sweep.get_epochs(training) == "1,2,last"
        assert sweep.get_trained_file(training).endswith(f"{training}/epoch=last/lorasweep.json")
        for point in sweep.points:
            assert sweep.get_taken_folder(point).endswith(f"{training}/adapter")
            assert sweep.get_taken_files(point)["record"] == sweep.get_training_record(training)
        assert sweep.get_choice_options(training) == ["--epochs", "3"]
        other = load_chosen(metric="match/std", higher_is_better=False)
        assert other.get_choice_options(*other.trainings) == [
            "--epochs",
            "3",
            "--metric",
            "match/std",
            "--lower-is-better",
        ]
        spec = json.loads(sweep.get_choice_spec(training))
        assert [task["name"] for task in spec["tasks"]] == ["dev"]
        assert (spec["mode"], spec["base_model"]) == ("B2", "model")
        assert sweep.get_model(training) == sweep.get_model(next(iter(sweep.points)))
        assert sweep.get_evaluation_gpus(training) == sweep.get_model_gpus(training) == 0
        assert [sweep.get_task_names(point) for point in sweep.points] == [["letters"], ["letters"]]
        assert sweep.task_files == ["tasks.py"]

    def test_what_its_scores_depend_on_is_a_part_of_the_training(self, load_chosen: Callable[..., Sweep]) -> None:
        def identify(*arguments: Any, **dev: Any) -> str:
            return next(iter(load_chosen(*arguments, **dev).trainings))

        first = identify()
        for dev in ({"limit": 6}, {"args": {"size": 3}}, {"metric": "a/b"}, {"higher_is_better": False}):
            assert identify(**dev) != first
        assert identify({"max_tokens": 3}) != first
        assert identify({"tasks": [{"task": "tasks.py@letters", "limit": 1}], "baseline": False}) == first
        with Path("tasks.py").open("a") as file:
            file.write("# another\n")
        assert identify() != first

    def test_it_asks_for_what_evaluations_of_all_epochs_need(self, load_chosen: Callable[..., Sweep]) -> None:
        sweep, more = load_chosen(), load_chosen(limit=5000)
        [training] = sweep.trainings
        [same] = more.trainings
        assert sweep.request("choose_epoch", "mem_mb", training) == sweep.request("evaluate", "mem_mb", "baseline")
        assert more.request("choose_epoch", "runtime", same) > sweep.request("choose_epoch", "runtime", training)
        assert load_chosen({"enabled": False}).evaluated == {}

    def test_it_is_on_the_trainings_own_base_model_with_its_own_template_and_precision(
        self, load: Callable[..., Sweep], load_chosen: Callable[..., Sweep], tmp_path: Path
    ) -> None:
        write_checkpoint(tmp_path / "wider", hidden_size=32)
        (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
        memory = float(read_checkpoint(tmp_path / "wider").num_parameters * 4)
        mine = {"bf16_flops": 1e12, "fp32_flops": 1e12, "bandwidth": 1e12, "memory": memory}
        sections: dict[str, Any] = {
            "model": {"device": "cuda"},
            "models": {"small": {"path": "model"}, "wider": {"path": "wider", "dtype": "fp32"}},
            "variables": {"model": ["small", "wider"]},
            "evaluation": {**load_chosen().experiment.evaluation.model_dump(exclude_unset=True), "gpus": "auto"},
            "plan": {"device": "mine", "devices": {"mine": mine}},
        }
        sections["models"]["wider"]["chat_template"] = "own.jinja"
        sweep = load(**sections)
        of = {sweep.get_model_path(training): training for training in sweep.trainings}
        assert sorted(of) == ["model", "wider"]
        specs = [json.loads(sweep.get_choice_spec(of[path])) for path in ("model", "wider")]
        assert [(spec["base_model"], spec["dtype"]) for spec in specs] == [("model", "bf16"), ("wider", "fp32")]
        assert [spec.get("chat_template") for spec in specs] == [None, "{{ messages[0].content }}"]
        for count in (sweep.get_model_gpus, sweep.get_evaluation_gpus):
            assert [count(of[path]) for path in ("model", "wider")] == [1, 2]

    def test_what_vllm_cannot_ask_is_refused_for_it_too(self, load_chosen: Callable[..., Sweep]) -> None:
        with pytest.raises(InputError, match=r"evaluation\.backend: 'vllm' needs model\.device: cuda"):
            load_chosen({"enabled": False, "backend": "vllm"}).check(asks_inspect=False)

    def test_without_the_base_model_it_is_planned_too(self, load_chosen: Callable[..., Sweep]) -> None:
        Path("model").rename("gone")
        assert len(load_chosen().trainings) == 1
