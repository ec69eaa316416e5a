"""Evaluation on a GPU: the three modes agree, and a batch of adapters on one base gives each row its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai.log import read_eval_log
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from evaluation_specs import make_spec
from lorasweep.adapters.adapter import read_adapter
from lorasweep.adapters.merge import merge
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.checkpoints.dtypes import PRECISIONS
from lorasweep.checkpoints.tensors import DTYPES
from lorasweep.evaluation.evaluate import evaluate, evaluate_adapters, make_model
from lorasweep.evaluation.probe import probe_logits
from lorasweep.evaluation.shared_base import SharedBase
from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec
from lorasweep.evaluation.state import EvaluationState

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "mlp": {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "linear": {"r": 16, "target_modules": "all-linear"},
}
SAMPLES = 12

NEAR = {"bf16": 0.08, "fp32": 1e-4}
"""How far logits of the same adapter may be apart on two devices, as a part of the largest."""
FAR = 0.3
"""Those of another adapter, and of the base, are farther."""

TASK = f"""
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match


@task
def numbers():
    samples = [Sample(input=f"{{'and ' * (i % 3)}}{{37 * i}}?", target="1") for i in range({SAMPLES})]
    return Task(samples, scorer=match())
"""


@pytest.fixture(scope="module", params=["bf16", "fp32"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(dtype: str, get_model_in: Callable[[str], Path]) -> Path:
    return get_model_in(dtype)


@pytest.fixture(scope="module")
def points(base: Path, dtype: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of points, each with an adapter in the model's precision, as a training leaves it."""
    folder = tmp_path_factory.mktemp("points")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[PRECISIONS[dtype]])
        config = LoraConfig(lora_alpha=8, task_type="CAUSAL_LM", **settings)
        model = get_peft_model(plain, config, autocast_adapter_dtype=False)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder / name / "adapter", save_embedding_layers=False)
    return {name: folder / name for name in ADAPTERS}


@pytest.fixture(scope="module")
def merged(base: Path, dtype: str, points: dict[str, Path]) -> dict[str, Path]:
    for point in points.values():
        merge(base, point / "adapter", point / "hf_model", dtype)
    return {name: point / "hf_model" for name, point in points.items()}


def load(folder: Path, dtype: str, device: str = "cuda") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[PRECISIONS[dtype]], device_map=device)


def distance(some: torch.Tensor, others: torch.Tensor) -> float:
    """The largest one, as a part of how far the others reach."""
    return float((some.float() - others.float()).abs().max() / others.float().abs().max())


class TestLogits:
    @pytest.fixture(scope="class")
    def shared(self, base: Path, dtype: str) -> SharedBase:
        return SharedBase(load(base, dtype), read_checkpoint(base))

    def test_an_attached_adapter_answers_as_its_merged_model_does(
        self, shared: SharedBase, base: Path, dtype: str, points: dict[str, Path], merged: dict[str, Path]
    ) -> None:
        for name, point in points.items():
            attached, proof = shared.attach(read_adapter(point / "adapter", read_checkpoint(base)))
            expected = probe_logits(load(merged[name], dtype))
            assert torch.equal(shared.probe(attached), expected)
            assert distance(shared.logits, expected) > FAR
            assert proof["probe_distance"] > 0
            on_cpu = distance(probe_logits(load(merged[name], dtype, "cpu")), expected)
            assert on_cpu < NEAR[dtype]
            shared.detach(attached)
        assert torch.equal(shared.probe(None), shared.logits)

    def test_adapters_that_take_turns_each_answer_as_at_first(
        self, shared: SharedBase, base: Path, dtype: str, points: dict[str, Path]
    ) -> None:
        names = {
            name: shared.attach(read_adapter(p / "adapter", read_checkpoint(base)))[0] for name, p in points.items()
        }
        tokens = torch.arange(97, 97 + 16, device="cuda").repeat(8, 1)
        options = {
            "attention_mask": torch.ones_like(tokens),
            "max_new_tokens": 1,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        order = [None, *names.values()]
        first = {name: shared.generate(name, input_ids=tokens, **options).logits[0] for name in order}
        for name in reversed(order):
            again = shared.generate(name, input_ids=tokens, **options).logits[0]
            apart = {other: distance(again, logits) for other, logits in first.items()}
            assert apart.pop(name) == 0
            assert min(apart.values()) > FAR


class TestModes:
    @pytest.fixture(scope="class")
    def completions(
        self, base: Path, dtype: str, points: dict[str, Path], merged: dict[str, Path], tmp_path_factory: Any
    ) -> dict[str, dict[str, list[str]]]:
        """What each mode answers for each point, and the base for all."""
        folder = tmp_path_factory.mktemp("modes")
        (folder / "task.py").write_text(TASK)

        def make(mode: str) -> EvaluationSpec:
            return make_spec(
                mode=mode,
                base_model=str(base),
                base_fingerprint=read_checkpoint(base).fingerprint,
                dtype=dtype,
                device="cuda",
                tasks=[TaskSpec(name="numbers", task=f"{folder}/task.py@numbers", args={}, limit=None)],
                max_connections=8,
                max_tokens=8,
            )

        said: dict[str, dict[str, list[str]]] = {}

        def read(mode: str, name: str, point: Path) -> None:
            log = read_eval_log(str(point / "eval/numbers.eval"))
            assert log.samples is not None
            said.setdefault(mode, {})[name] = [sample.output.completion for sample in log.samples]
            metrics = json.loads((point / "eval/metrics.json").read_text())
            assert metrics["mode"] == mode
            assert mode == "base" or metrics["proof"]["probe_distance"] > 0

        evaluate(make("base"), folder / "baseline", folder / "probes")
        read("base", "base", folder / "baseline")
        for name, point in points.items():
            for mode in ("A", "B1"):
                evaluate(make(mode), point, folder / "probes", merged[name] if mode == "B1" else None)
                read(mode, name, point)
        assert evaluate_adapters(make("B2"), list(points.values())) == {}
        for name, point in points.items():
            EvaluationState(make("B2"), point).publish()
            read("B2", name, point)
        return said

    def test_they_give_the_same_answers(self, completions: dict[str, dict[str, list[str]]], dtype: str) -> None:
        assert completions["A"] == completions["B1"]
        pairs = [
            (merged, direct)
            for name in ADAPTERS
            for merged, direct in zip(completions["B1"][name], completions["B2"][name], strict=True)
        ]
        same = sum(merged == direct for merged, direct in pairs)
        print(f"{dtype}: {same} of {len(pairs)} answers are the same merged and direct")
        # In bf16 rounding decides between two near tokens, and what follows is another answer: of this model, often.
        assert same >= (0.5 if dtype == "bf16" else 1) * len(pairs)

    def test_each_adapter_changes_the_answers(self, completions: dict[str, dict[str, list[str]]]) -> None:
        answers = [completions["base"]["base"], *completions["B2"].values()]
        assert len({tuple(answer) for answer in answers}) == 1 + len(ADAPTERS)


class TestSeveralGpus:
    @pytest.fixture(autouse=True)
    def _two_gpus(self) -> None:
        if (seen := torch.cuda.device_count()) < 2:
            pytest.skip(f"needs two GPUs: torch.cuda.device_count() is {seen} here")

    def test_a_spread_model_answers_as_one_on_a_single_gpu(
        self, base: Path, dtype: str, points: dict[str, Path], merged: dict[str, Path], tmp_path: Path
    ) -> None:
        (tmp_path / "task.py").write_text(TASK)
        answers: dict[tuple[str, str, int], list[str]] = {}
        distances: dict[tuple[str, str, int], float] = {}
        for mode in ("A", "B2"):
            for gpus in (1, 2):
                spec = make_spec(
                    mode=mode,
                    base_model=str(base),
                    base_fingerprint=read_checkpoint(base).fingerprint,
                    dtype=dtype,
                    device="cuda",
                    tasks=[TaskSpec(name="numbers", task=f"{tmp_path}/task.py@numbers", args={}, limit=None)],
                    max_connections=8,
                    max_tokens=8,
                    gpus=gpus,
                )
                folder = tmp_path / f"{mode}-{gpus}"
                for name, point in points.items():
                    shutil.copytree(point / "adapter", folder / name / "adapter")
                    shutil.copytree(merged[name], folder / name / "hf_model")
                if mode == "A":
                    for name in points:
                        evaluate(spec, folder / name, tmp_path / "probes")
                else:
                    assert evaluate_adapters(spec, [folder / name for name in points]) == {}
                for name in points:
                    if mode == "B2":
                        EvaluationState(spec, folder / name).publish()
                    metrics = json.loads((folder / name / "eval/metrics.json").read_text())
                    assert metrics.get("gpus", 1) == gpus
                    log = read_eval_log(str(folder / name / "eval/numbers.eval"))
                    assert log.samples is not None
                    answers[mode, name, gpus] = [sample.output.completion for sample in log.samples]
                    distances[mode, name, gpus] = metrics["proof"]["probe_distance"]
        for (mode, name, gpus), answer in answers.items():
            assert answer == answers[mode, name, 1]
            assert distances[mode, name, gpus] == distances[mode, name, 1]

    def test_its_layers_are_on_both(self, base: Path, dtype: str) -> None:
        spec = make_spec(base_model=str(base), dtype=dtype, device="cuda", gpus=2)
        model = make_model(spec, "hf/base", read_checkpoint(base), model_path=str(base)).api.model
        assert {parameter.device.index for parameter in model.parameters()} == {0, 1}
        whole = load(base, dtype, "cuda:0")
        assert torch.equal(probe_logits(model), probe_logits(whole))
