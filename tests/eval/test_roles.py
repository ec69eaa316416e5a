"""Models of roles: a judge is loaded once for all points of a job, is the one that judges, and keeps no key."""

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai.log import read_eval_log
from inspect_ai.model import ChatMessageUser, GenerateConfig, get_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from evaluation_specs import make_spec
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation import roles
from lorasweep.evaluation.evaluate import evaluate, evaluate_adapters
from lorasweep.evaluation.spec import EvaluationSpec, RoleSpec, TaskSpec, fingerprint_role
from lorasweep.evaluation.state import EvaluationState
from recipes import GIVEN_TEMPLATE
from tiny_model import make_model, make_tokenizer

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import get_model
from inspect_ai.scorer import Score, mean, model_graded_qa, scorer

SAMPLES = [Sample(input=f"after {letter}", target=letter) for letter in "abc"]


@scorer(metrics=[mean()])
def length_of_verdict():
    async def score(state, target):
        verdict = await get_model(role="grader", required=True).generate(f"{state.output.completion}?")
        return Score(value=len(verdict.completion), answer=verdict.completion)

    return score


@task
def judged():
    return Task(SAMPLES, scorer=length_of_verdict())


@task
def graded():
    return Task(SAMPLES, scorer=model_graded_qa())
"""


def save_model(folder: Path, seed: int) -> Path:
    tokenizer = make_tokenizer(has_chat_template=True)
    make_model("llama3", tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", seed=0)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("judge") / "model", seed=1)


@pytest.fixture
def points(base: Path, tmp_path: Path) -> list[Path]:
    for seed in range(2):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / f"seed={seed}/adapter", save_embedding_layers=False)
    return [tmp_path / f"seed={seed}" for seed in range(2)]


@pytest.fixture
def make(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(roles, "_OPENED", {})

    def make(mode: str, task: str, grader: RoleSpec) -> EvaluationSpec:
        (tmp_path / "task.py").write_text(TASK)
        return make_spec(
            mode=mode,
            base_model=str(base),
            base_fingerprint=read_checkpoint(base).fingerprint,
            tasks=[TaskSpec(name=task, task=f"{tmp_path}/task.py@{task}", args={}, limit=None)],
            max_connections=1,
            model_roles={"grader": grader.model_copy(update={"fingerprint": fingerprint_role(grader)})},
        )

    return make


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that models were loaded from."""
    loaded: list[str] = []
    read = AutoModelForCausalLM.from_pretrained

    def load(path: Any, **arguments: Any) -> Any:
        loaded.append(str(path))
        return read(path, **arguments)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    return loaded


def ask(folder: Path, prompts: list[str], **arguments: Any) -> list[str]:
    """What a model answers alone."""
    config = GenerateConfig(max_tokens=6, max_connections=1)
    arguments |= {"do_sample": False, "device": "cpu", "tokenizer_call_args": {"add_special_tokens": False}}
    model = get_model("hf/alone", memoize=False, config=config, model_path=str(folder), **arguments)

    async def answer() -> list[str]:
        return [(await model.generate(prompt)).completion for prompt in prompts]

    return asyncio.run(answer())


def read_samples(log: Path) -> list[Any]:
    samples = read_eval_log(str(log)).samples
    assert samples
    return samples


def test_a_local_judge_is_loaded_once_for_all_points_and_gives_its_own_verdicts(
    make: Any, base: Path, judge: Path, points: list[Path], loads: list[str]
) -> None:
    spec = make("B2", "judged", RoleSpec(model=f"hf/{judge}", config={"max_tokens": 6}, args={}))
    assert evaluate_adapters(spec, points) == {}
    assert loads.count(str(judge)) == loads.count(str(base)) == 1
    answers = []
    for point in points:
        EvaluationState(spec, point).publish()
        samples = read_samples(point / "eval/judged.eval")
        answers.append([sample.output.completion for sample in samples])
        verdicts = [sample.scores["length_of_verdict"] for sample in samples]
        expected = ask(judge, [f"{answer}?" for answer in answers[-1]])
        assert [verdict.answer for verdict in verdicts] == expected
        assert expected != ask(base, [f"{answer}?" for answer in answers[-1]])
        metrics = json.loads((point / "eval/metrics.json").read_text())
        assert metrics["model_roles"] == {"grader": f"hf/{judge}"}
        assert metrics["tasks"]["judged"]["scores"]["length_of_verdict/mean"] == pytest.approx(
            sum(map(len, expected)) / len(expected)
        )
        assert (
            read_eval_log(str(point / "eval/judged.eval"), header_only=True).eval.model_roles["grader"].config.seed == 0
        )
    assert answers[0] != answers[1]


def test_a_judge_with_an_adapter_is_another_judge(make: Any, base: Path, points: list[Path], tmp_path: Path) -> None:
    arguments = {"base": str(base), "adapter": str(points[0] / "adapter")}
    spec = make("base", "judged", RoleSpec(model="lorasweep/judge", config={"max_tokens": 6}, args=arguments))
    assert spec.model_roles["grader"].fingerprint.startswith(f"{read_checkpoint(base).fingerprint} ")
    evaluate(spec, tmp_path / "baseline", tmp_path / "probes")
    samples = read_samples(tmp_path / "baseline/eval/judged.eval")
    plain = ask(base, [f"{sample.output.completion}?" for sample in samples])
    assert plain != [sample.scores["length_of_verdict"].answer for sample in samples]


def test_a_judge_is_asked_by_the_template_that_its_adapter_keeps(make: Any, base: Path, points: list[Path]) -> None:
    adapter = points[0] / "adapter"
    given = read_checkpoint(base, GIVEN_TEMPLATE)
    given.copy_tokenizer(adapter)
    record = {"base_model_fingerprint": given.fingerprint, **given.template_record}
    (adapter / "lorasweep.json").write_text(json.dumps(record))
    arguments = {"base": str(base), "adapter": str(adapter)}
    spec = make("base", "judged", RoleSpec(model="lorasweep/judge", config={}, args=arguments))
    api = roles.open_roles(spec)["grader"].api
    assert api.hf_chat([ChatMessageUser(content="a")], []) == "<user>a<|im_end|>\n<assistant>"


def test_a_judge_that_has_changed_fails_the_points_by_name(
    make: Any, judge: Path, points: list[Path], tmp_path: Path
) -> None:
    spec = make("B2", "judged", RoleSpec(model=f"hf/{judge}", config={}, args={}))
    grader = spec.model_roles["grader"].model_copy(update={"fingerprint": "another"})
    failures = evaluate_adapters(spec.model_copy(update={"model_roles": {"grader": grader}}), points[:1])
    assert list(failures) == ["seed=0"]
    assert "model role 'grader': hf/" in failures["seed=0"]
    assert "has changed since this run began" in failures["seed=0"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A server with OpenAI's interface whose model finds every answer correct."""
    seen: dict[str, Any] = {"keys": set(), "asked": []}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen["keys"].add(self.headers["Authorization"])
            seen["asked"].append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            message = {"role": "assistant", "content": "GRADE: C"}
            content = {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "judge",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
            }
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    seen["url"] = f"http://127.0.0.1:{http.server_port}/v1"
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-the-environment")
    yield seen
    http.shutdown()


def test_a_judge_on_a_server_gets_the_key_of_the_environment_and_no_file_does(
    make: Any, server: dict[str, Any], tmp_path: Path
) -> None:
    grader = RoleSpec(
        model="openai/gpt-judge", config={"max_tokens": 99}, args={"responses_api": False}, base_url=server["url"]
    )
    spec = make("base", "graded", grader)
    point = tmp_path / "baseline"
    evaluate(spec, point, tmp_path / "probes")
    metrics = json.loads((point / "eval/metrics.json").read_text())
    assert metrics["tasks"]["graded"]["scores"]["model_graded_qa/accuracy"] == 1
    assert metrics["versions"]["openai"]
    assert server["keys"] == {"Bearer a-key-of-the-environment"}
    assert len(server["asked"]) == 3
    assert {asked["model"] for asked in server["asked"]} == {"gpt-judge"}
    said = read_eval_log(str(point / "eval/graded.eval")).model_dump_json()
    assert server["url"] in said
    for text in (said, (point / "eval/metrics.json").read_text(), spec.model_dump_json()):
        assert "a-key-of-the-environment" not in text
