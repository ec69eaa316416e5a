"""The plan: sizes against known figures, jobs against each other, times against hand-made sums."""

import json
from collections.abc import Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lorasweep.checkpoints.architecture import get_architecture
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.shapes import read_shape
from lorasweep.checkpoints.sizes import get_adapter_size, get_model_size, get_tokenizer_size
from lorasweep.experiment.devices import DEVICES, check_device
from lorasweep.experiment.points import get_baselines, get_points
from lorasweep.experiment.sections import Controls, Experiment
from lorasweep.experiment.task_choice import choose_tasks
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.planning.costs import START_SECONDS, Base, Costs, TaskSize
from lorasweep.planning.counting import guess_task_sizes
from lorasweep.planning.forecast import Forecast
from lorasweep.planning.lengths import Lengths
from lorasweep.planning.planner import LOG_BYTES, SAMPLE_BYTES, Planner
from lorasweep.planning.timeline import PlannedJob, simulate
from lorasweep.util.errors import InputError
from lorasweep.util.formats import format_seconds

ROOT = Path(__file__).parents[3]

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    # From the model cards: parameters of the checkpoints as they are published.
    "Llama-3.1-8B": (
        LLAMA | {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 14336},
        8_030_261_248,
    ),
    "Llama-3.1-70B": (
        LLAMA | {"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192, "intermediate_size": 28672},
        70_553_706_496,
    ),
    "Llama-3.2-1B": (
        LLAMA
        | {"num_hidden_layers": 16, "num_attention_heads": 32, "hidden_size": 2048, "intermediate_size": 8192}
        | {"tie_word_embeddings": True, "head_dim": 64},
        1_235_814_400,
    ),
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "vocab_size": 152064, "num_key_value_heads": 4, "num_hidden_layers": 28}
        | {"num_attention_heads": 28, "hidden_size": 3584, "intermediate_size": 18944},
        7_615_616_512,
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "vocab_size": 151936, "num_key_value_heads": 2, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "hidden_size": 896, "intermediate_size": 4864, "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen3-8B": (json.loads((ROOT / "tests/models/qwen3_8b/config.json").read_text()), 8_190_735_360),
    "Gemma-3-1B": (
        {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144},
        999_885_952,
    ),
    "GPT-2": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8}
        | {"num_experts_per_tok": 2},
        46_702_792_704,
    ),
}

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
ADAPTERS: list[tuple[dict[str, Any], list[float]]] = [
    # MB of the values of a bf16 adapter of Llama-3.1-8B at ranks 8, 16, 32 and 64 (design of the checkpoint options).
    ({"lora_attn_modules": ["q_proj", "v_proj"]}, [6.8, 13.6, 27.3, 54.5]),
    ({"lora_attn_modules": ["q_proj", "v_proj", "output_proj"]}, [11.0, 22.0, 44.0, 88.1]),
    ({"lora_attn_modules": ATTENTION}, [13.6, 27.3, 54.5, 109.1]),
    ({"lora_attn_modules": ATTENTION, "apply_lora_to_mlp": True}, [41.9, 83.9, 167.8, 335.5]),
]


def make_base(folder: Path, name: str = "Llama-3.1-8B") -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[name][0]))
    return read_shape(folder)


# Others of these families say the same of each commit.
MORE = ("Llama-3.1-70B", "Llama-3.2-1B", "Qwen2.5-7B")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in MORE else name for name in SHAPES]
)
def test_parameters_follow_from_the_configuration_alone(tmp_path: Path, name: str) -> None:
    base = make_base(tmp_path, name)
    assert base.num_parameters == SHAPES[name][1]
    # The header is what is left beside the values.
    assert 0 < get_model_size(base, "bf16") - 2 * base.num_parameters < 200_000


@pytest.mark.parametrize(("keys", "sizes"), ADAPTERS)
def test_adapters_have_the_sizes_that_are_known(tmp_path: Path, keys: dict[str, Any], sizes: list[float]) -> None:
    base = make_base(tmp_path)
    for rank, size in zip((8, 16, 32, 64), sizes, strict=True):
        found = get_adapter_size(base, Controls(lora_rank=rank, **keys), "bf16") / 1e6
        assert found == pytest.approx(size, abs=0.15)


BAD = [
    ({"model_type": "xyz"}, "config.json' has model_type 'xyz'. Expected: a causal language model of transformers"),
    ({}, "config.json' has model_type None"),
    (
        {"model_type": "llama", "hidden_size": "64"},
        "config.json': transformers cannot build this llama model: .*hidden_size",
    ),
    ([], "config.json' cannot be read"),
    (None, "config.json' cannot be read"),
]


@pytest.mark.parametrize(("config", "said"), BAD)
def test_a_configuration_that_transformers_cannot_build_is_refused(tmp_path: Path, config: Any, said: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"(?s)^'{tmp_path}/{said}"):
        read_shape(tmp_path)


MULTIPLIED = {
    # Without the input embedding; with the one that is the head too, but not that of positions; two of eight experts.
    "Qwen3-8B": 8_190_735_360 - 151936 * 4096,
    "Gemma-3-1B": 999_885_952,
    "GPT-2": 124_439_808 - 1024 * 768,
    "Mixtral-8x7B": 46_702_792_704 - 32000 * 4096 - 32 * 6 * 3 * 4096 * 14336,
}


@pytest.mark.parametrize("name", MULTIPLIED)
def test_times_count_the_parameters_that_a_token_is_multiplied_with(tmp_path: Path, name: str) -> None:
    assert get_architecture(make_base(tmp_path, name)).matrix_values == MULTIPLIED[name]


def test_sizes_are_found_under_a_familys_own_names(tmp_path: Path) -> None:
    gpt2 = get_architecture(make_base(tmp_path, "GPT-2"))
    assert (gpt2.num_layers, gpt2.hidden_size, gpt2.vocab_size, gpt2.num_heads) == (12, 768, 50257, 12)
    assert (gpt2.max_positions, gpt2.head, gpt2.tied) == (1024, "lm_head", True)


def test_a_model_of_text_and_images_is_planned_by_its_text(tmp_path: Path) -> None:
    """Gemma-3-4B, whose published configuration leaves out what is as transformers has it."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "image_size": 896}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = read_shape(tmp_path)
    architecture = get_architecture(base)
    assert (architecture.num_layers, architecture.hidden_size, architecture.vocab_size) == (34, 2560, 262208)
    assert base.num_parameters == 4_300_079_472


def make_planner(
    tmp_path: Path, parallel: int = 1, factors: Mapping[str, float] | None = None, **sections: Any
) -> Planner:
    plain = {
        "experiment": {"name": "e"},
        "variables": {"lora_rank": [8, 16, 32, 64]},
        "model": {"path": str(tmp_path)},
        "data": {"train": "none"},
        "evaluation": {"tasks": ["pkg/t"], "max_tokens": 64, **sections.pop("evaluation", {})},
        **sections,
    }
    experiment = Experiment.model_validate(plain)
    points = get_points(experiment, tmp_path / "points.json")
    tasks = {"t": TaskSize(100, 200)}
    costs = Costs(
        experiment,
        Base(experiment.choose_model(None), make_base(tmp_path)),
        Lengths.count(experiment.data, [[0, 400], [0, 600]] * 500),
        tasks,
        factors or {},
    )
    baselines = get_baselines(experiment, points)
    return Planner(experiment, points, baselines, dict.fromkeys([*points, *baselines], costs), parallel)


def get_costs(planner: Planner) -> Costs:
    return next(iter(planner.costs.values()))


def test_jobs_are_counted_in_every_mode(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, evaluation={"adapters_per_job": 3})
    shared = {"configure": 4, "train": 4, "take": 4, "cleanup": 5, "read_samples": 1, "collect": 1, "report": 1}
    unevaluated = make_planner(tmp_path, evaluation={"enabled": False, "tasks": [], "merge_adapters": False})
    assert unevaluated.plan_all("B2").jobs == shared | {"cleanup": 4}
    assert planner.plan_all("A").jobs == shared | {"export": 4, "evaluate": 5}
    assert planner.plan_all("B1").jobs == shared | {"merge": 4, "evaluate": 5}
    assert planner.plan_all("B2").jobs == shared | {"evaluate_adapters": 2, "publish": 4, "evaluate": 1}
    assert planner.plan_all().jobs == planner.plan_all("B1").jobs


def test_other_models_are_planned_by_their_own_size(tmp_path: Path) -> None:
    planner = make_planner(tmp_path)
    large = make_base(tmp_path / "large", "Llama-3.1-70B")
    costs = get_costs(planner)
    others = {"large": replace(costs, base=replace(costs.base, checkpoint=large)), "same": costs}
    base = planner.baselines["baseline"]
    baselines = {**planner.baselines, **{name: replace(base, name=name) for name in others}}
    planner = replace(planner, costs={**planner.costs, **others}, baselines=baselines)
    plan = planner.plan_all("B1")
    assert plan.jobs["evaluate"] == 7
    assert plan.jobs["cleanup"] == 7
    rows = {row.name: row for row in planner.plan_points([])}
    assert list(rows)[:3] == ["baseline", "large", "same"]
    assert {rows[name].mode for name in ("baseline", "large", "same")} == {"base"}
    assert rows["large"].seconds["evaluate"] > 5 * rows["baseline"].seconds["evaluate"]
    assert rows["same"].seconds == rows["baseline"].seconds
    assert rows["large"].mem_mb == plan.mem_mb > rows["same"].mem_mb
    assert planner.plan_remaining({("evaluate", "large")}, {}).seconds == rows["large"].seconds


def test_a_tasks_own_options_are_planned(tmp_path: Path) -> None:
    def plan(counted: bool, **options: int) -> float:
        planner = make_planner(tmp_path, evaluation={"tasks": [{"task": "pkg/t", "limit": 100, **options}]})
        size = TaskSize(100 * options.get("epochs", 1), 256, options.get("max_tokens"))
        guessed = guess_task_sizes([TaskEntry("t", task, None) for task in planner.experiment.evaluation.tasks])
        tasks = {"t": size} if counted else guessed
        costs = replace(get_costs(planner), tasks=tasks, are_tasks_counted=counted)
        return replace(planner, costs=dict.fromkeys(planner.costs, costs)).plan_all("B1").seconds["evaluate"]

    for counted in (True, False):
        assert plan(counted, epochs=3) > plan(counted) > plan(counted, max_tokens=8)
        assert plan(counted, max_tokens=64) == plan(counted)


def test_a_point_is_planned_by_its_own_tasks(tmp_path: Path) -> None:
    tasks = [{"task": "pkg/t"}, {"task": "pkg/long", "when": "lora_rank > 16"}]
    planner = make_planner(tmp_path, evaluation={"tasks": tasks, "adapters_per_job": 4})
    entries = [TaskEntry(task.task.removeprefix("pkg/"), task, None) for task in planner.experiment.evaluation.tasks]
    sizes = {"t": TaskSize(100, 200), "long": TaskSize(900, 200)}
    points = choose_tasks(planner.experiment, entries, planner.points)
    planner = replace(
        planner, points=points, costs=dict.fromkeys(planner.costs, replace(get_costs(planner), tasks=sizes))
    )
    rows = {row.name: row for row in planner.plan_points([])}
    short, long, base = rows["lora_rank=16"], rows["lora_rank=32"], rows["baseline"]
    assert short.seconds["evaluate"] < long.seconds["evaluate"] == base.seconds["evaluate"]
    assert long.kept_bytes - short.kept_bytes > 900 * SAMPLE_BYTES
    logs = replace(planner, log_bytes={"t": 1_000, "long": 5_000_000})
    kept = {row.name: row.kept_bytes for row in logs.plan_points([])}
    assert kept["baseline"] - 5_001_000 == rows["baseline"].kept_bytes - 2 * LOG_BYTES - 1000 * SAMPLE_BYTES
    assert kept["lora_rank=16"] - 1_000 == short.kept_bytes - LOG_BYTES - 100 * SAMPLE_BYTES
    whole = planner.plan_all("B2")
    assert whole.jobs["evaluate_adapters"] == 2  # two points with one task, two with both
    assert whole.kept_bytes == pytest.approx(sum(row.kept_bytes for row in rows.values()), abs=8_001)


@pytest.mark.parametrize(("warmup", "is_told"), [(3, True), (2, False), (0, False)])
def test_a_warmup_that_no_training_leaves_is_told(tmp_path: Path, warmup: int, is_told: bool) -> None:
    planner = make_planner(tmp_path, controls={"max_steps_per_epoch": 3, "num_warmup_steps": warmup})
    wanted = [("train", name) for name in planner.points]
    said = Forecast(planner.experiment, tmp_path / "results/e", planner, {}, [], wanted, {}).describe_shortly()
    note = "num_warmup_steps: 3 is not below the 3 steps of the training, whose learning rate does not reach lr: "
    assert (f"{note}lora_rank=8 and 3 more." in " ".join(said.split())) == is_told


def test_only_b1_has_a_merged_model_at_its_peak_and_a_keeps_them_all(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, parallel=4)
    full = get_model_size(get_costs(planner).base.checkpoint, "bf16")
    plans = {mode: planner.plan_all(mode) for mode in ("A", "B1", "B2")}
    assert plans["A"].kept_bytes - plans["B2"].kept_bytes == pytest.approx(4 * full, rel=0.001)
    assert plans["B1"].kept_bytes == plans["B2"].kept_bytes
    assert full <= plans["B1"].temporary_bytes <= 4.2 * full
    assert planner.max_merged_models == 5
    assert plans["B2"].temporary_bytes < full / 10
    bounded = make_planner(tmp_path, parallel=4, evaluation={"max_merged_models": 1}).plan_all("B1")
    assert full < bounded.temporary_bytes < 1.1 * full
    assert plans["B1"].written_bytes > 4 * full > plans["B2"].written_bytes


@pytest.mark.parametrize("prune", [None, {"after": [1], "keep": 1.0}])
def test_a_training_by_trl_has_its_states_in_fp32(tmp_path: Path, prune: Any) -> None:
    controls, data = {"epochs": 2}, {"train": "t", "validation": "v"}
    planners = [
        make_planner(tmp_path, trainer=trainer, controls=controls, data=data, prune=prune)
        for trainer in ("torchtune", "trl")
    ]
    torchtune, trl = (planner.plan_all("B2").temporary_bytes for planner in planners)
    ranks = (8, 16, 32, 64) if prune else (64,)
    adapters = [planners[0].get_adapter_bytes(planners[0].points[f"lora_rank={rank}"]) for rank in ranks]
    assert trl - torchtune == pytest.approx(6 * sum(adapters), rel=0.01)


def test_models_merged_elsewhere_do_not_count_among_the_results(tmp_path: Path) -> None:
    there, here = (
        make_planner(tmp_path, parallel=4, evaluation={"merged_models_in": where}).plan_all("B1")
        for where in ("/scratch", None)
    )
    assert there.temporary_bytes < here.temporary_bytes / 10
    assert there.written_bytes == here.written_bytes


@pytest.mark.parametrize("mode", ["A", "B1", "B2"])
def test_what_points_keep_is_what_the_sweep_keeps_with_adapters_that_are_given_too(tmp_path: Path, mode: str) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "adapter_config.json").touch()
    (given / "adapter_model.safetensors").write_bytes(b"x" * 100_000)
    keys = {"A": {"model_format": "hf"}, "B1": {"merge_adapters": True}, "B2": {"merge_adapters": False}}[mode]
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    planner = make_planner(tmp_path, evaluation=keys, runs=[{"name": "theirs", "adapter": str(given)}])
    points = planner.plan_points([])
    whole = planner.plan_all()
    assert whole.jobs["adopt"] == 1
    assert whole.kept_bytes == pytest.approx(sum(point.kept_bytes for point in points), abs=8_001)
    assert whole.tokens == sum(point.tokens for point in points)
    wanted = {("adopt", "theirs")}
    assert planner.plan_remaining(wanted, {}).kept_bytes == 109_000


@pytest.mark.parametrize("mode", ["A", "B1", "B2"])
def test_the_table_of_points_has_the_whole_time_of_each(tmp_path: Path, mode: str) -> None:
    keys = {"A": {"model_format": "hf"}, "B1": {"merge_adapters": True}, "B2": {"merge_adapters": False}}[mode]
    planner = make_planner(tmp_path, evaluation=keys)
    forecast = Forecast(planner.experiment, tmp_path / "results/e", planner, {}, [], [], {})
    console = Console(file=StringIO(), width=200)
    forecast.show(console)
    assert isinstance(console.file, StringIO)
    [line] = [line for line in console.file.getvalue().splitlines() if line.split()[:1] == ["lora_rank=8"]]
    [seconds] = [row.seconds for row in planner.plan_points([]) if row.name == "lora_rank=8"]
    evaluation = seconds["evaluate_adapters" if mode == "B2" else "evaluate"]
    times = [format_seconds(time) for time in (sum(seconds.values()) - evaluation, evaluation)]
    assert line.split()[-4:] == [part for time in times for part in time.split()]


def test_a_rerun_needs_no_room_for_what_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**15))
    planner = make_planner(tmp_path, evaluation={"model_format": "hf"}, plan={"storage_limit_gb": 0.1})
    results = tmp_path / "results/e"
    wanted = {("export", name) for name in planner.points}
    forecast = Forecast(planner.experiment, results, planner, {}, [], wanted, {})
    assert forecast.explain_shortage() is not None
    for name in planner.points:
        (results / name / "hf_model").mkdir(parents=True)
        with (results / name / "hf_model/weights").open("wb") as file:
            file.truncate(16_000_000_000)
    roomy = planner.experiment.model_copy(
        update={"plan": planner.experiment.plan.model_copy(update={"storage_limit_gb": 70.0})}
    )
    assert Forecast(roomy, results, planner, {}, [], wanted, {}).explain_shortage() is None


def test_what_is_to_do_is_planned_apart(tmp_path: Path) -> None:
    planner = make_planner(tmp_path)
    name = "lora_rank=16"
    wanted = {
        ("train", name),
        ("merge", name),
        ("evaluate", name),
        ("cleanup", name),
        ("read_samples", ""),
        ("collect", ""),
        ("report", ""),
    }
    remaining, whole = planner.plan_remaining(wanted, {}), planner.plan_all()
    assert remaining.jobs == {
        "train": 1,
        "merge": 1,
        "evaluate": 1,
        "cleanup": 1,
        "read_samples": 1,
        "collect": 1,
        "report": 1,
    }
    assert remaining.kept_bytes < whole.kept_bytes / 2
    assert remaining.seconds["train"] == pytest.approx(whole.seconds["train"] / 4, rel=0.01)
    assert {point.name for point in planner.plan_points({name}) if point.is_done} == {name}
    assert planner.plan_remaining([], {}).wall_seconds == 0


def test_steps_and_tokens_are_those_of_whole_batches(tmp_path: Path) -> None:
    costs = get_costs(make_planner(tmp_path))
    controls = Controls(batch_size=8, gradient_accumulation_steps=4, epochs=2)
    training = costs.get_training(controls)
    assert training.steps == 2 * (1000 // 8 // 4)
    assert training.tokens == training.steps * 32 * 500
    cut = costs.get_training(controls.model_copy(update={"max_seq_len": 500}))
    assert cut.tokens == training.steps * 32 * 450
    packed = costs.get_training(Controls(batch_size=1, packed=True, max_seq_len=1000))
    assert packed.steps == 500
    assert packed.tokens == 500_000


def test_a_trainings_time_is_its_operations_by_what_the_device_does(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, plan={"device": "h100", "efficiency": 0.5})
    point = planner.points["lora_rank=8"]
    tokens = get_costs(planner).get_training(point.controls).tokens
    # 4 P a token is nearly all of it: the embedding is looked up, attention and LoRA are small.
    least = (
        4
        * (get_costs(planner).base.checkpoint.num_parameters - 128256 * 4096)
        * tokens
        / (0.5 * DEVICES["h100"].bf16_flops)
    )
    seconds = (
        get_costs(planner).model("train", [point])
        - START_SECONDS
        - 2 * get_costs(planner).base.checkpoint.num_parameters / 1e9
    )
    assert least < seconds < 1.1 * least


def test_earlier_jobs_correct_the_model(tmp_path: Path) -> None:
    plain, learnt = make_planner(tmp_path), make_planner(tmp_path, factors={"train": 3.0})
    point = plain.points["lora_rank=8"]
    assert get_costs(learnt).estimate("train", [point]) == 3 * get_costs(plain).estimate("train", [point])
    assert get_costs(learnt).model("train", [point]) == get_costs(plain).model("train", [point])


def test_a_device_of_ones_own_is_taken_and_an_unknown_one_refused(tmp_path: Path) -> None:
    mine = {"bf16_flops": 1e15, "fp32_flops": 1e14, "bandwidth": 4e12}
    own = make_planner(tmp_path, plan={"device": "mine", "devices": {"mine": mine}})
    assert get_costs(own).device.bf16_flops == 1e15
    check_device(own.experiment)
    with pytest.raises(InputError, match=r"^plan\.device: 'h10' is not known .did you mean 'h100'"):
        check_device(make_planner(tmp_path, plan={"device": "h10"}).experiment)


def test_where_there_is_no_room_it_is_said_which_bound_or_mode_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**15))
    planner = make_planner(tmp_path, parallel=4, plan={"storage_limit_gb": 20.0})
    wanted = {(rule, name) for name in planner.points for rule in ("train", "merge", "evaluate")}
    forecast = Forecast(planner.experiment, tmp_path / "results/e", planner, {}, [], wanted, {})
    said = forecast.explain_shortage()
    assert said is not None
    assert "this run needs 64." in said
    assert "20 GB are free (plan.storage_limit_gb: 20" in said
    assert "evaluation.max_merged_models: 1 (17 GB)" in said
    assert "mode B2 (model_format: adapter, merge_adapters: false) (1." in said
    enough = make_planner(tmp_path, parallel=1, plan={"storage_limit_gb": 20.0})
    forecast = Forecast(enough.experiment, tmp_path / "results/e", enough, {}, [], wanted, {})
    assert forecast.explain_shortage() is None


def job(seconds: float, *after: int, **changes: Any) -> PlannedJob:
    return PlannedJob(changes.pop("rule", "train"), ("p",), seconds, after, **changes)


def test_jobs_wait_for_places_for_each_other_and_for_the_bound() -> None:
    trainings = [job(10), job(10), job(10), job(10)]
    assert simulate(trainings, 1, 9).seconds == 40
    assert simulate(trainings, 3, 9).seconds == 20
    assert simulate([job(10), job(5, 0, rule="evaluate")], 4, 9).seconds == 15
    merges = [job(2, rule="merge", merged=100) for _ in range(4)]
    evaluations = [job(10, index, rule="evaluate", reads_merged=True, merged=100) for index in range(4)]
    free, bounded = (simulate([*merges, *evaluations], 4, bound) for bound in (4, 2))
    assert (free.seconds, free.peak_temporary) == (12, 400)
    assert (bounded.seconds, bounded.peak_temporary) == (24, 200)
    # One job at a time: the next model is merged before the previous one is gone only if the bound allows two.
    assert simulate([*merges, *evaluations], 1, 2).peak_temporary == 100
    left_behind = [job(10, rule="evaluate", reads_merged=True, merged=100) for _ in range(3)]
    assert simulate([*left_behind, merges[0]], 4, 2).peak_temporary == 300


def test_more_merged_models_than_the_bound_are_all_there_at_the_end_if_nothing_reads_them() -> None:
    merges = [job(2, rule="merge", merged=100) for _ in range(4)]
    line = simulate(merges, 4, 1)
    assert (line.seconds, line.peak_temporary, line.moments[-1]) == (8, 400, (8.0, 0, 400))


def test_bytes_are_there_when_they_should_be() -> None:
    line = simulate([job(10, kept=5, temporary=7), job(1, 0, rule="evaluate", kept=1)], 1, 1)
    assert line.kept == 6
    assert line.peak_temporary == 7
    assert (10.0, 5, 0) in line.moments
    assert line.moments[-1] == (11.0, 6, 0)


def test_what_a_job_leaves_is_there_until_a_later_job_removes_it() -> None:
    jobs = [job(10, kept=5, temporary=7, left=4), job(10, kept=5, temporary=7, left=4)]
    jobs += [job(1, index, rule="choose_epoch", temporary=1, left=-4) for index in (0, 1)]
    line = simulate(jobs, 1, 1)
    assert line.peak_temporary == 7  # a choice comes before the next training
    assert line.moments[-1] == (22.0, 10, 0)
    assert simulate(jobs, 2, 1).peak_temporary == 14


CHOSEN = {"epochs": "best", "validation_task": "pkg/dev"}


def test_a_task_that_chooses_epochs_is_planned_with_the_adapters_of_all_until_then(tmp_path: Path) -> None:
    def plan(**evaluation: Any) -> Planner:
        planner = make_planner(tmp_path, controls={"epochs": 3}, model={"path": "m", "device": "cuda"}, **evaluation)
        size = TaskSize(50, 200) if evaluation else None
        costs = replace(get_costs(planner), validation=size)
        return replace(planner, costs=dict.fromkeys(planner.costs, costs))

    planner, plain = plan(evaluation=CHOSEN), plan()
    whole, before = planner.plan_all(), plain.plan_all()
    assert whole.jobs == {**before.jobs, "choose_epoch": 4}
    assert whole.kept_bytes == before.kept_bytes
    assert whole.gpu_seconds["choose_epoch"] == whole.seconds["choose_epoch"]
    # Three epochs on half of the samples of the points' task, and one load.
    costs, point = get_costs(planner), planner.points["lora_rank=8"]
    load = costs.model("evaluate", [])
    choice, evaluation = (costs.model(rule, [point]) for rule in ("choose_epoch", "evaluate"))
    assert choice - load == pytest.approx(1.5 * (evaluation - load))
    own = {row.name: row.seconds for row in planner.plan_points(())}
    assert own["lora_rank=8"]["choose_epoch"] == choice
    assert "choose_epoch" not in own["baseline"]
    adapters = sum(planner.get_adapter_bytes(point) for point in planner.points.values())
    parallel = [replace(each, parallel=4).plan_all().temporary_bytes for each in (planner, plain)]
    assert parallel[0] >= parallel[1] > adapters
    # The rest needs no room for what is there already.
    wanted = {("choose_epoch", "lora_rank=8"), ("cleanup", "lora_rank=8")}
    rest = planner.plan_remaining(wanted, {})
    assert rest.jobs == {"choose_epoch": 1, "cleanup": 1}
    copy = planner.get_adapter_bytes(point) + get_tokenizer_size(costs.base.checkpoint)
    assert rest.temporary_bytes == 3 * (LOG_BYTES + 50 * SAMPLE_BYTES) + copy


PRUNED = {"after": [1, 2], "keep": 0.5}


def test_trainings_that_may_stop_are_planned_as_if_all_settings_were_alike(tmp_path: Path) -> None:
    def plan(**sections: Any) -> Planner:
        data = {"train": "t", "validation": "v"}
        return make_planner(
            tmp_path, controls={"epochs": 4}, data=data, model={"path": "m", "device": "cuda"}, **sections
        )

    planner, plain = plan(prune=PRUNED), plan()
    whole, before = planner.plan_all(), plain.plan_all()
    assert before.jobs["train"] == 4
    assert whole.jobs == {**before.jobs, "train_part": 8, "prune": 2}
    assert whole.kept_bytes == before.kept_bytes
    # All train the first quarter, half of them the second, a quarter the rest.
    assert whole.steps == before.steps * (0.25 + 0.5 * 0.25 + 0.25 * 0.5)
    assert whole.tokens == pytest.approx(before.tokens / 2, abs=4)
    costs, point = get_costs(planner), planner.points["lora_rank=8"]
    load = costs.model("train", [])
    training = costs.model("train", [point]) - load
    assert costs.estimate_part("train_part", point, 1, 2) == pytest.approx(load + training / 4)
    assert whole.gpu_seconds["train_part"] == whole.seconds["train_part"]
    assert whole.gpu_seconds.get("prune", 0.0) == 0.0
    assert whole.gpu_hours < before.gpu_hours
    # A decision waits for all parts before it, and the next parts for the decision.
    jobs = planner._make_jobs(dict.fromkeys(planner.points, "B1"), [])
    by_rule = {(job.rule, job.name): job for job in jobs}
    parts = [index for index, job in enumerate(jobs) if job.name.endswith("__after=1")]
    assert by_rule["prune", "after=1"].after == tuple(parts)
    first = jobs.index(by_rule["prune", "after=1"])
    assert by_rule["train_part", "lora_rank=8__after=2"].after == (first,)


def test_the_rest_of_a_training_that_may_stop_needs_no_room_for_what_is_there(tmp_path: Path) -> None:
    data = {"train": "t", "validation": "v"}
    planner = make_planner(tmp_path, controls={"epochs": 4}, data=data, prune=PRUNED)
    wanted = {("train", "lora_rank=8"), ("prune", "after=2"), ("train_part", "lora_rank=8__after=2")}
    rest = planner.list_rest(wanted, {})
    assert rest.keys() == wanted
    assert sum(job.left for job in rest.values()) == 0
    assert planner.list_rest({("train", "lora_rank=8")}, {})["train", "lora_rank=8"].left == 0
    assert planner.plan_remaining(wanted, {}).temporary_bytes > 0
    moments = planner.plan_all().timeline.moments
    assert min(temporary for _, _, temporary in moments) == 0
    assert moments[-1][2] == 0


def test_a_decision_by_a_task_is_paid_like_an_evaluation_of_what_is_in_the_race(tmp_path: Path) -> None:
    by = {"task": "pkg/dev"}
    planner = make_planner(
        tmp_path, controls={"epochs": 4}, model={"path": "m", "device": "cuda"}, prune={**PRUNED, "by": by}
    )
    costs = replace(get_costs(planner), validation=TaskSize(50, 200))
    planner = replace(planner, costs=dict.fromkeys(planner.costs, costs))
    whole = planner.plan_all()
    load, each = costs.model("evaluate", []), costs._answer_task(TaskSize(50, 200))
    assert whole.seconds["prune"] == pytest.approx(2 * load + (4 + 2) * each)
    assert whole.gpu_seconds["prune"] == whole.seconds["prune"]
    assert planner.list_deciding() == list(planner.points)


def test_gpus_share_a_training_and_each_of_them_is_paid(tmp_path: Path) -> None:
    one, four = (make_planner(tmp_path, controls={"batch_size": 2, "gpus": gpus}) for gpus in (1, 4))
    point, shared = one.points["lora_rank=8"], four.points["lora_rank=8"]
    # 1000 samples: 500 steps of 2, or 125 of 4 times 2.
    alone, together = get_costs(one), get_costs(four)
    assert (alone.get_training(point.controls).steps, together.get_training(shared.controls).steps) == (500, 125)
    assert alone.get_training(point.controls).tokens == together.get_training(shared.controls).tokens
    load = alone.model("train", [])
    assert together.model("train", [shared]) - load == pytest.approx((alone.model("train", [point]) - load) / 4)
    plan = four.plan_all("B1")
    assert plan.gpu_hours == pytest.approx((4 * plan.seconds["train"] + plan.seconds["evaluate"]) / 3600)
    assert plan.as_json()["gpu_hours"]["train"] == pytest.approx(4 * plan.seconds["train"] / 3600)
    [row] = [row for row in four.plan_points([]) if row.name == "lora_rank=8"]
    assert row.gpu_hours == pytest.approx((4 * row.seconds["train"] + row.seconds["evaluate"]) / 3600)
    assert row.mem_mb == 4 * next(row for row in one.plan_points([]) if row.name == "lora_rank=8").mem_mb


def test_samples_that_no_gpu_has_too_few_of_are_seen_twice(tmp_path: Path) -> None:
    planner = make_planner(tmp_path, controls={"batch_size": 1, "gpus": 3})
    # 1000 samples are 334 for each of three.
    assert get_costs(planner).get_training(planner.points["lora_rank=8"].controls).steps == 334


def test_the_gpus_of_an_evaluation_are_paid_and_share_its_time_if_vllm_splits_each_tensor(tmp_path: Path) -> None:
    def make(gpus: int, backend: str) -> Planner:
        evaluation = {"gpus": gpus, "backend": backend, "merge_adapters": False}
        return make_planner(tmp_path, evaluation=evaluation)

    one, four, split = make(1, "hf"), make(4, "hf"), make(4, "vllm")
    load = get_costs(one).model("evaluate", [])
    answers = [
        get_costs(planner).model("evaluate", [planner.baselines["baseline"]]) - load for planner in (one, four, split)
    ]
    assert answers == pytest.approx([answers[0], answers[0], answers[0] / 4])
    plan = four.plan_all("B2")
    rules = {"train": 1, "evaluate": 4, "evaluate_adapters": 4}
    assert plan.gpu_hours * 3600 == pytest.approx(sum(n * plan.seconds[rule] for rule, n in rules.items()))
    row = next(row for row in four.plan_points([]) if row.name == "baseline")
    assert row.gpu_hours == pytest.approx(4 * row.seconds["evaluate"] / 3600)
