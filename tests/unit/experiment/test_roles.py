"""The models of roles in the experiment file: which are local, which need the network, and no secret among them."""

import re
from typing import Any

import pytest

from lorasweep.experiment.roles import check_roles
from lorasweep.experiment.sections import Evaluation
from lorasweep.util.errors import InputError

SECRET = "sk-1234"


def make(grader: Any, **changes: Any) -> Evaluation:
    return Evaluation.model_validate({"model_roles": {"grader": grader}, **changes})


@pytest.mark.parametrize(
    "grader",
    [
        "hf/models/judge",
        {"model": "hf/judge", "args": {"model_path": "models/judge", "dtype": "float32"}, "config": {"max_tokens": 8}},
        {"model": "lorasweep/judge", "args": {"base": "models/base", "adapter": "adapters/judge"}},
        "mockllm/model",
    ],
)
def test_a_local_model_needs_no_network(grader: Any) -> None:
    check_roles(make(grader))


@pytest.mark.parametrize(
    "grader",
    ["openai/gpt-4o", {"model": "vllm/judge", "base_url": "http://node:8000/v1", "args": {"eos_token_id": 2}}],
)
def test_a_model_on_a_server_needs_the_networks_permission(grader: Any) -> None:
    check_roles(make(grader, allow_network=True))
    with pytest.raises(
        InputError, match=r"^evaluation\.model_roles\.grader: '.*' is asked over the network. Expected: "
    ):
        check_roles(make(grader))


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ({"args": {"api_key": SECRET}}, "args.api_key"),
        ({"args": {"token": SECRET}}, "args.token"),
        ({"args": {"aws_secret_access_key": SECRET}}, "args.aws_secret_access_key"),
        ({"args": {"client": [{"apiKey": SECRET}]}}, "args.client.0.apiKey"),
        ({"config": {"extra_headers": {"Authorization": SECRET}}}, "config.extra_headers.Authorization"),
        ({"config": {"extra_headers": {"x-api-key": SECRET}}}, "config.extra_headers.x-api-key"),
        ({"base_url": f"https://me:{SECRET}@node/v1"}, "base_url"),
    ],
)
def test_a_secret_in_the_file_is_refused_by_its_key_and_not_repeated(part: dict[str, Any], key: str) -> None:
    where = re.escape(f"evaluation.model_roles.grader.{key}: a secret does not belong in the file. Expected: ")
    with pytest.raises(InputError, match=f"^{where}") as refused:
        check_roles(make({"model": "openai/gpt-4o", **part}, allow_network=True))
    assert SECRET not in str(refused.value)


BAD = [
    ("gpt-4o", {}, "evaluation.model_roles.grader: 'gpt-4o' is invalid. Expected: Inspect's name of a model"),
    ("lorasweep/judge", {}, "evaluation.model_roles.grader.args: {} is invalid. Expected: base: the folder"),
    ({"model": "hf/a", "base_url": "http://b"}, {}, "base_url: 'http://b' does not go with a local model"),
    ("hf/a", {"backend": "vllm"}, "'hf/a' does not go with evaluation.backend: vllm"),
]


@pytest.mark.parametrize(("grader", "changes", "message"), BAD)
def test_what_is_no_model_is_refused(grader: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_roles(make(grader, **changes))
