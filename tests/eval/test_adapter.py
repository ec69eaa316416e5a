"""An adapter is applied as it is, or nothing is merged and nothing evaluated."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_specs import make_spec
from lorasweep.adapters.adapter import AdapterError, ChangedBaseError, check_injected, read_adapter
from lorasweep.adapters.adopt import adopt_adapter
from lorasweep.adapters.identity import digest_config
from lorasweep.adapters.merge import merge
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation import evaluate as evaluator
from lorasweep.evaluation.evaluate import evaluate, evaluate_adapters
from lorasweep.evaluation.inspect_tasks import EvaluationError
from lorasweep.evaluation.probe import probe_logits
from lorasweep.evaluation.shared_base import SharedBase
from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec
from lorasweep.evaluation.state import EvaluationState, is_evaluated
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.versions import get_git_revision
from tiny_model import make_model, make_tokenizer

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate, solver


@task
def letters() -> Task:
    return Task(dataset=[Sample(input=a, target=a) for a in "abcd"], solver=generate(), scorer=match())


@solver
def broken():
    async def solve(state, generate):
        raise ValueError("the third sample is bad")
    return solve


@task
def failing() -> Task:
    return Task(dataset=[Sample(input="a", target="a")], solver=broken(), scorer=match())
"""


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(seed: int) -> Path:
        directory = tmp_path_factory.mktemp("base") / "model"
        tokenizer = make_tokenizer(has_chat_template=True)
        make_model("llama3", tokenizer, seed).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base(0)


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT made, with an update as large as a training leaves."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def point(tmp_path: Path, trained: Path) -> Path:
    """A point's folder with its adapter, free to be spoilt."""
    folder = tmp_path / "point"
    shutil.copytree(trained, folder / "adapter")
    (tmp_path / "tasks.py").write_text(TASK)
    return folder


def spoil(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def zero(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}


def misname(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("self_attn", "attention"): t for name, t in tensors.items()}


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if "lora_A" in name}


def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(t, float("nan")) for name, t in tensors.items()}


def widen(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([t, t], dim=1) if "lora_A" in name else t for name, t in tensors.items()}


def add_biases(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {
        name.replace("weight", "bias"): t[:, 0].clone() for name, t in tensors.items() if "lora_B" in name
    }


SPOILT = [
    (zero, "the adapter is zero"),
    (misname, "does not have"),
    (half, "Expected: lora_A and lora_B"),
    (poison, "not finite"),
    (widen, "trained for another model"),
]


def spec(base: Path, point: Path, mode: str, task: str = "letters") -> EvaluationSpec:
    return make_spec(
        mode=mode,
        base_model=str(base),
        base_fingerprint=read_checkpoint(base).fingerprint,
        tasks=[TaskSpec(name=task, task=f"{point.parent / 'tasks.py'}@{task}", args={}, limit=None)],
    )


@pytest.mark.parametrize(("change", "said"), SPOILT, ids=[change.__name__ for change, _ in SPOILT])
def test_a_spoilt_adapter_is_neither_merged_nor_evaluated(
    base: Path, point: Path, change: Callable[..., dict[str, torch.Tensor]], said: str
) -> None:
    spoil(point / "adapter", change)
    with pytest.raises(AdapterError, match=said):
        merge(base, point / "adapter", point / "merged", "fp32")
    failures = evaluate_adapters(spec(base, point, "B2"), [point])
    assert said in failures["point"]
    assert [file.name for file in (point / "eval").iterdir()] == ["reproduce.py"]
    with pytest.raises(InputError, match=said):
        EvaluationState(spec(base, point, "B2"), point).publish()
    assert sorted(file.name for file in point.iterdir()) == ["adapter", "eval", "state"]


def test_a_bias_of_a_module_that_has_none_is_refused_by_its_cause(base: Path, point: Path) -> None:
    file = point / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_bias": True}))
    spoil(point / "adapter", add_biases)
    with pytest.raises(AdapterError, match=r"lora_bias trained a bias of 'model\..*', which has none in the base"):
        read_adapter(point / "adapter", read_checkpoint(base))


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank_pattern", None), ("bias", "some"), ("alpha_pattern", "q_proj"), ("lora_dropout", 2), ("r", "4")],
)
def test_a_configuration_that_peft_cannot_read_is_refused_with_its_file_however_it_is_evaluated(
    base: Path, point: Path, key: str, value: Any
) -> None:
    file = point / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises((AttributeError, NotImplementedError, TypeError, ValueError)):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(point / "adapter"))
    with pytest.raises(AdapterError) as refused:
        merge(base, point / "adapter", point / "merged", "fp32")
    assert str(file) in str(refused.value)
    assert evaluate_adapters(spec(base, point, "B2"), [point])["point"].endswith(str(refused.value))


def test_an_adapter_in_the_folder_of_the_base_is_not_evaluated_as_the_base(
    base: Path, point: Path, tmp_path: Path
) -> None:
    """Transformers would load both."""
    both = Path(shutil.copytree(base, tmp_path / "both"))
    for file in (point / "adapter").iterdir():
        shutil.copyfile(file, both / file.name)
    logits = [probe_logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (base, both)]
    assert (logits[0] - logits[1]).abs().max() > 1
    with pytest.raises(InputError, match=r"transformers would apply that adapter to the base model"):
        merge(both, point / "adapter", point / "merged", "fp32")
    with pytest.raises(InputError, match=r"has adapter_config\.json"):
        read_checkpoint(both)


def test_an_adapter_of_a_base_of_the_same_shapes_is_refused_by_its_fingerprint(
    base: Path, point: Path, make_base: Callable[..., Path]
) -> None:
    record = {"base_model_fingerprint": read_checkpoint(base).fingerprint}
    (point / "adapter/lorasweep.json").write_text(json.dumps(record))
    other = make_base(1)
    with pytest.raises(AdapterError, match="another base model"):
        merge(other, point / "adapter", point / "merged", "fp32")
    assert "another base model" in evaluate_adapters(spec(other, point, "B2"), [point])["point"]


def test_tensors_that_a_model_lost_or_changed_are_named(base: Path, trained: Path) -> None:
    adapter = read_adapter(trained, read_checkpoint(base))
    state = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(trained)).state_dict()
    assert check_injected(adapter, state, "default") == len(adapter.tensors)
    name = next(name for name in state if "lora_A" in name)
    with pytest.raises(AdapterError, match="1 tensors not applied"):
        check_injected(adapter, {k: v for k, v in state.items() if k != name}, "default")
    with pytest.raises(AdapterError, match="1 tensors changed on loading"):
        check_injected(adapter, state | {name: state[name] + 1}, "default")
    with pytest.raises(AdapterError, match="1 tensors without weights"):
        check_injected(adapter, state | {name.replace("layers.0", "layers.9"): state[name]}, "default")


def test_a_merged_model_is_base_and_adapter_in_one_and_carries_no_adapter_file(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    merge(base, trained, tmp_path / "merged", "fp32")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.startswith("adapter")]
    merged = probe_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    untouched = probe_logits(plain)
    direct = probe_logits(PeftModel.from_pretrained(plain, str(trained)))
    assert (merged - direct).abs().max() < 1e-3
    assert (merged - untouched).abs().max() > 1


def test_a_model_that_was_made_of_another_adapter_is_not_evaluated(base: Path, point: Path) -> None:
    merge(base, point / "adapter", point / "merged", "fp32")
    spoil(point / "adapter", lambda tensors: {name: t * 2 for name, t in tensors.items()})
    with pytest.raises(AdapterError, match=r"this model was not made from .* and the adapter in"):
        evaluate(spec(base, point, "B1"), point, point / "probes", point / "merged")


def test_a_model_that_was_made_by_another_configuration_is_not_evaluated(base: Path, point: Path) -> None:
    merge(base, point / "adapter", point / "merged", "fp32")
    strengthen(point / "adapter")
    with pytest.raises(AdapterError, match=r"this model was not made from .* and the adapter in"):
        evaluate(spec(base, point, "B1"), point, point / "probes", point / "merged")


def strengthen(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 80}))


def test_an_adopted_adapter_has_the_tokenizer_and_its_scores_are_known_by_its_configuration_too(
    base: Path, point: Path, trained: Path
) -> None:
    adapter = point / "adapter"
    for template in (None, "{{ messages[0].content }}"):
        adopt_adapter(trained, adapter, base, template)
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        assert tokenizer.encode("after a") == AutoTokenizer.from_pretrained(base).encode("after a")
        assert tokenizer.chat_template == (template or AutoTokenizer.from_pretrained(base).chat_template)
    adopt_adapter(trained, adapter, base)
    asked = spec(base, point, "B2")
    assert evaluate_adapters(asked, [point]) == {}
    EvaluationState(asked, point).publish()
    known = json.loads((adapter / "lorasweep.json").read_text())["adopted_config_sha256"]
    assert json.loads((point / "eval/metrics.json").read_text())["adapter_config_sha256"] == known
    assert is_evaluated(asked, point)
    stronger = shutil.copytree(trained, point.with_name("stronger"))
    strengthen(stronger)
    adopt_adapter(stronger, adapter, base)
    assert digest_config(adapter) != known
    assert not is_evaluated(asked, point)
    assert not EvaluationState(asked, point).is_finished()


def test_a_merged_model_without_the_update_is_not_evaluated(base: Path, point: Path) -> None:
    merge(base, point / "adapter", point / "merged", "fp32")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    record = (point / "merged/lorasweep.json").read_text()
    model.save_pretrained(point / "merged")
    (point / "merged/lorasweep.json").write_text(record)
    with pytest.raises(AdapterError, match="no effect"):
        evaluate(spec(base, point, "B1"), point, point / "probes", point / "merged")


def test_a_failing_task_leaves_no_metrics_and_says_why(base: Path, point: Path) -> None:
    merge(base, point / "adapter", point / "merged", "fp32")
    with pytest.raises(EvaluationError, match="the third sample is bad"):
        evaluate(spec(base, point, "B1", "failing"), point, point / "probes", point / "merged")
    assert "the third sample is bad" in evaluate_adapters(spec(base, point, "B2", "failing"), [point])["point"]
    assert not (point / "eval/metrics.json").exists()


@pytest.mark.parametrize("mode", ["B1", "B2"])
def test_an_evaluation_carries_its_proof(base: Path, point: Path, mode: str) -> None:
    merge(base, point / "adapter", point / "merged", "fp32")
    if mode == "B1":
        evaluate(spec(base, point, mode), point, point / "probes", point / "merged")
    else:
        assert evaluate_adapters(spec(base, point, mode), [point]) == {}
        EvaluationState(spec(base, point, mode), point).publish()
    metrics = json.loads((point / "eval/metrics.json").read_text())
    assert metrics["git_revision"] == get_git_revision()
    proof = metrics["proof"]
    assert proof["adapter_tensors"] == 2 * 3 * read_checkpoint(base).config["num_hidden_layers"]
    assert proof["probe_distance"] > 1
    assert not (point / "state/eval").exists()


def read_proof(point: Path) -> dict[str, Any]:
    return dict(json.loads((point / "state/eval/done/metrics.json").read_text())["proof"])


def test_a_spoilt_adapter_between_two_changes_nothing_for_them(base: Path, point: Path) -> None:
    others = [point.with_name(name) for name in ("before", "after")]
    for other in others:
        shutil.copytree(point, other)
    spoil(point / "adapter", zero)
    failures = evaluate_adapters(spec(base, point, "B2"), [others[0], point, others[1]])
    assert list(failures) == ["point"]
    assert read_proof(others[0]) == read_proof(others[1])


def test_a_gpu_that_gave_up_is_not_held_against_the_adapters_after_it(
    base: Path, point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    other = shutil.copytree(point, point.with_name("other"))
    monkeypatch.setattr(evaluator, "_run_tasks", give_up)
    with pytest.raises(RuntimeError, match="device-side assert"):
        evaluate_adapters(spec(base, point, "B2"), [point, other])
    assert (point / "state/eval/error.txt").is_file()
    assert not (other / "state").exists()


def test_results_on_a_base_that_was_not_the_one_in_its_files_are_discarded(
    base: Path, point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_a_difference(shared: SharedBase) -> None:
        raise ChangedBaseError("a weight in memory differs from the base model's files")

    monkeypatch.setattr(SharedBase, "restore", find_a_difference)
    with pytest.raises(ChangedBaseError):
        evaluate_adapters(spec(base, point, "B2"), [point])
    assert not EvaluationState(spec(base, point, "B2"), point).is_finished()


def test_what_is_done_is_not_done_again(base: Path, point: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate_adapters(spec(base, point, "B2"), [point]) == {}
    monkeypatch.setattr(evaluator, "_run_tasks", None)
    assert evaluate_adapters(spec(base, point, "B2"), [point]) == {}
    EvaluationState(spec(base, point, "B2"), point).publish()
    assert evaluate_adapters(spec(base, point, "B2"), [point]) == {}


@pytest.mark.parametrize("mode", ["B2", "base"])
def test_a_tasks_file_that_has_changed_since_the_run_began_is_not_evaluated_by(
    base: Path, point: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record has the digests of the files that the run saw."""
    monkeypatch.setattr(evaluator, "_run_tasks", None)
    file = str(point.parent / "tasks.py")
    planned = spec(base, point, mode).model_copy(update={"files": {file: digest_file(Path(file))}})
    Path(file).write_text(TASK.replace('"abcd"', '"abc"'))
    said = f"{file}: the file of a task has changed since this run began"
    if mode == "base":
        with pytest.raises(InputError, match=re.escape(said)):
            evaluate(planned, point, point.parent / "probes")
    else:
        assert said in evaluate_adapters(planned, [point])["point"]
