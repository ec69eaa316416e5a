"""What goes to vLLM, as far as that can be seen without a GPU: arguments, refusals, requests.

In vLLM's place stands a server that speaks as much of its API as Inspect uses; vLLM itself is not here.
"""

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from peft import LoraConfig, get_peft_model

import forked_evaluation
from evaluation_specs import make_spec
from lorasweep.adapters.adapter import Adapter, AdapterError
from lorasweep.checkpoints.checkpoint import Tensor
from lorasweep.evaluation import vllm as vllm_server
from lorasweep.evaluation.inspect_tasks import make_options
from lorasweep.evaluation.reproduce import write_reproduction
from lorasweep.evaluation.spec import VLLM_RANKS, EvaluationSpec, TaskSpec
from lorasweep.evaluation.vllm import (
    get_server_args,
    make_served_model,
    measure_distance,
    open_server,
    refuse_unserved,
)
from tiny_model import make_model, make_tokenizer


def make_adapter(path: Path, rank: int, **config: Any) -> Adapter:
    tensors = {
        "m.lora_A.weight": Tensor("f", "F32", (rank, 8), 0, 0),
        "m.lora_B.weight": Tensor("f", "F32", (8, rank), 0, 0),
    }
    update = SimpleNamespace(a="m.lora_A.weight")
    return Adapter(path, {"r": rank, **config}, tensors, {"m.weight": update})


@pytest.fixture
def base(tmp_path: Path) -> Any:
    tokenizer = make_tokenizer(has_chat_template=True)
    tokenizer.save_pretrained(tmp_path / "base")
    template = tokenizer.chat_template
    return SimpleNamespace(
        path=tmp_path / "base", has_chat_template=True, chat_template=template, given_template=None, fingerprint="f"
    )


@pytest.fixture
def spec(tmp_path: Path) -> EvaluationSpec:
    return make_spec(
        backend="vllm", base_model=str(tmp_path / "base"), dtype="bf16", device="cuda", max_tokens=8, seed=3
    )


@pytest.mark.parametrize(("ranks", "served"), [([1], 8), ([8, 16], 16), ([4, 17], 32), ([200], 256), ([300], 320)])
def test_the_server_is_ready_for_the_largest_rank(
    spec: EvaluationSpec, base: Any, tmp_path: Path, ranks: list[int], served: int
) -> None:
    arguments = get_server_args(spec, base, [make_adapter(tmp_path, rank) for rank in ranks])
    assert arguments == {"dtype": "bfloat16", "seed": 3, "enable_lora": True, "max_lora_rank": served}
    assert served in VLLM_RANKS


def test_a_larger_rank_of_a_pattern_counts(spec: EvaluationSpec, base: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, 64)
    adapter.config["r"] = 8
    assert get_server_args(spec, base, [adapter])["max_lora_rank"] == 64


def test_several_gpus_split_each_tensor(spec: EvaluationSpec, base: Any) -> None:
    arguments = get_server_args(spec.model_copy(update={"gpus": 4}), base, [])
    assert arguments == {"dtype": "bfloat16", "seed": 3, "tensor_parallel_size": 4}


def test_a_rank_that_vllm_does_not_take_is_refused(spec: EvaluationSpec, base: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a rank over 512 is not applied"):
        refuse_unserved(make_adapter(tmp_path, 1000))


def test_a_base_without_a_chat_template_is_prompted_as_by_hf(spec: EvaluationSpec, base: Any) -> None:
    base.has_chat_template, base.chat_template = False, None
    assert get_server_args(spec, base, [])["use_chat_template"] is False


@pytest.mark.parametrize(
    ("feature", "value"), [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("lora_bias", True)]
)
def test_what_vllm_would_not_apply_is_refused_by_name(tmp_path: Path, feature: str, value: Any) -> None:
    with pytest.raises(AdapterError, match=f"{feature} is not applied by vLLM. Expected: backend: hf"):
        refuse_unserved(make_adapter(tmp_path, 8, **{feature: value}))


def test_the_distance_is_the_largest_difference_of_a_logprob() -> None:
    one = [{"a": -0.1, "b": -3.0}, {"a": -1.0}]
    assert measure_distance(one, one) == 0
    assert measure_distance(one, [{"a": -0.1, "b": -3.5}, {"a": -1.0}]) == 0.5
    assert measure_distance(one, [{"c": -0.1, "b": -3.0}, {"a": -1.0}]) == pytest.approx(2.9)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A server that answers the adapter `good` otherwise than the base, and `idle` as the base."""
    seen: dict[str, Any] = {"loaded": [], "asked": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            names = ["base", *(entry["lora_name"] for entry in seen["loaded"])]
            self.answer({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.endswith("/load_lora_adapter"):
                seen["loaded"].append(body)
                self.answer({})
                return
            seen["asked"].append(body)
            logprob = -1.0 if "good" in body["model"] else -0.5
            top = {"token": "a", "logprob": logprob, "bytes": [97]}
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "a"},
                "logprobs": {"content": [{**top, "top_logprobs": [top]}]},
            }
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            self.answer(
                {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [choice],
                    "usage": usage,
                }
            )

        def answer(self, content: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("VLLM_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1")
    yield seen
    http.shutdown()


def test_every_adapter_is_loaded_into_one_server_and_its_effect_is_measured(
    server: dict[str, Any], spec: EvaluationSpec, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "idle"):
        folder = tmp_path / name / "adapter"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text('{"r": 8}')
        (folder / "adapter_model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(vllm_server, "read_adapter", lambda path, base: make_adapter(path, 8))
    points = [tmp_path / "good", tmp_path / "idle"]
    with open_server(spec, base, points) as open_model:
        with open_model(points[0]) as (model, proof):
            assert proof["probe_distance"] == 0.5
            assert str(model).startswith("vllm/")
        with pytest.raises(AdapterError, match="has no effect"), open_model(points[1]):
            pass
    assert [entry["lora_path"] for entry in server["loaded"]] == [str(point / "adapter") for point in points]
    assert {body["model"] for body in server["asked"]} == {str(base.path), *(str(p / "adapter") for p in points)}


def test_a_request_has_the_prefix_of_its_task(server: dict[str, Any], spec: EvaluationSpec, base: Any) -> None:
    model = make_served_model(spec, base, None, ())
    for prefix in ("It is ", None):
        task = TaskSpec(name="a", task="a.py", args={}, limit=None, assistant_prefix=prefix)
        make_options(spec, task, model)
        output = asyncio.run(model.generate("after a"))
        assert output.completion == "a"
    begun, other = server["asked"][-2:]
    assert begun["chat_template_kwargs"] == {"assistant_prefix": "It is "}
    assert "chat_template_kwargs" not in other
    assert begun["messages"] == other["messages"]
    assert begun["stop_token_ids"] == other["stop_token_ids"]


def ask(server: dict[str, Any], spec: EvaluationSpec, base: Any, prefix: str | None = None) -> dict[str, Any]:
    """Return the request for an answer in a task."""
    model = make_served_model(spec, base, None, ())
    make_options(spec, TaskSpec(name="a", task="a.py", args={}, limit=None, assistant_prefix=prefix), model)
    asyncio.run(model.generate("after a"))
    body: dict[str, Any] = server["asked"][-1]
    return body


@pytest.mark.parametrize("prefix", [None, "It is "])
def test_a_prompt_without_a_chat_template_begins_with_the_tokenizers_special_tokens(
    server: dict[str, Any], spec: EvaluationSpec, base: Any, prefix: str | None
) -> None:
    assert "add_special_tokens" not in ask(server, spec, base, prefix)  # the template writes them
    base.has_chat_template, base.chat_template = False, None
    assert ask(server, spec, base, prefix)["add_special_tokens"] is True


@pytest.mark.parametrize("prefix", [None, "It is "])
def test_a_template_that_asks_whether_to_think_is_told_what_training_tells_it(
    server: dict[str, Any], spec: EvaluationSpec, base: Any, prefix: str | None
) -> None:
    base.chat_template += "{% if enable_thinking is not defined %}/think{% endif %}"
    begun = {"assistant_prefix": prefix} if prefix else {}
    assert ask(server, spec, base, prefix)["chat_template_kwargs"] == {"enable_thinking": None, **begun}


TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match


@task
def a():
    return Task(dataset=[Sample(input="?", target="a")], scorer=match())
"""


@pytest.mark.parametrize("mode", ["B2", "base"])
def test_the_page_that_evaluates_again_asks_a_server(
    server: dict[str, Any], tmp_path: Path, mode: Literal["B2", "base"]
) -> None:
    tokenizer = make_tokenizer(has_chat_template=True)
    tokenizer.save_pretrained(tmp_path / "base")
    model = make_model("llama3", tokenizer, seed=0)
    model.save_pretrained(tmp_path / "base")
    point = tmp_path / "results/x/point"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(point / "adapter")
    (tmp_path / "a.py").write_text(TASK)
    spec = make_spec(mode=mode, backend="vllm", base_model="base", dtype="bf16", device="cuda")
    write_reproduction(spec, point, {})
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_DATA_HOME": str(tmp_path / "data")}
    done = forked_evaluation.call(point / "eval/reproduce.py", environment=environment, cwd=tmp_path)
    assert "point: no scores of this evaluation are recorded\n  a match/accuracy: 1.0\n" in done.stdout, done.stderr
    assert done.returncode == 1
    asked = point / "adapter" if mode == "B2" else tmp_path / "base"
    assert {body["model"] for body in server["asked"]} == {str(asked)}
