"""The specification of an evaluation names the date of a chat template, and only of one that writes a date."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.evaluation.spec import EvaluationSpec, make_evaluation_spec
from lorasweep.experiment.loading import load_experiment
from lorasweep.util.digest import digest_text
from lorasweep.util.errors import InputError
from plain_checkpoint import write_checkpoint

DATED = '{{ strftime_now("%d %b %Y") }}{{ messages }}'


def make(
    model: Path,
    roles: dict[str, Any] | None = None,
    given: Path | None = None,
    **data: Any,
) -> EvaluationSpec:
    config = {
        "experiment": {"name": "x"},
        "model": {"path": str(model), **({"chat_template": str(given)} if given else {})},
        "data": {"train": "t", **data},
        "evaluation": {"model_roles": roles or {}},
    }
    experiment = load_experiment(config, "x.yaml")
    return make_evaluation_spec(experiment, [], [], "B2", "", experiment.choose_model(None), experiment.data)


def write_dated(folder: Path) -> Path:
    write_checkpoint(folder)
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


def test_the_date_of_a_template_is_part_of_the_evaluation(tmp_path: Path) -> None:
    dated = write_dated(tmp_path / "dated")
    assert make(dated).template_date == "2024-07-26"
    assert make(dated, template_date="2025-01-31").template_date == "2025-01-31"
    assert make(dated).sha256 != make(dated, template_date="2025-01-31").sha256
    assert make(dated, format="completion").template_date is None


def test_a_template_without_a_date_leaves_the_evaluation_as_it_is(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain")
    assert make(plain).sha256 == make(plain, template_date="2025-01-31").sha256
    assert "template_date" not in make(plain).model_dump()


def test_the_date_of_a_judge_s_template_is_part_of_the_evaluation(tmp_path: Path) -> None:
    plain, judge = write_checkpoint(tmp_path / "plain"), write_dated(tmp_path / "judge")
    assert make(plain, roles={"grader": {"model": f"hf/{judge}"}}).template_date == "2024-07-26"


def test_a_given_template_is_part_of_the_evaluation_of_the_base_model_and_its_points(tmp_path: Path) -> None:
    dated = write_dated(tmp_path / "dated")
    given = tmp_path / "given.jinja"
    given.write_text("{{ messages }}")
    spec = make(dated, given=given)
    assert spec.chat_template == "{{ messages }}"
    assert spec.template_date is None  # that of the model's own
    moved = given.rename(tmp_path / "moved.jinja")
    assert make(dated, given=moved).sha256 == spec.sha256
    moved.write_text(DATED)
    assert make(dated, given=moved).sha256 != spec.sha256
    assert make(dated, given=moved).template_date == "2024-07-26"
    # Plain text is asked as without it.
    plain = make(dated, given=moved, format="completion")
    assert plain == make(dated, format="completion")
    assert "chat_template" not in plain.model_dump()


def test_a_judges_adapter_brings_the_template_by_which_the_judge_is_asked(tmp_path: Path) -> None:
    plain, judge, adapter = (
        write_checkpoint(tmp_path / "plain"),
        write_checkpoint(tmp_path / "judge"),
        tmp_path / "mine",
    )
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    role = {"grader": {"model": "lorasweep/mine", "args": {"base": str(judge), "adapter": str(adapter)}}}
    before = make(plain, roles=role)
    assert before.template_date is None
    (adapter / "chat_template.jinja").write_text(DATED)
    assert make(plain, roles=role) == before
    (adapter / "adapter_config.json").write_text(json.dumps({"lora_alpha": 64}))
    assert make(plain, roles=role).model_roles != before.model_roles
    (adapter / "lorasweep.json").write_text(json.dumps({"chat_template_sha256": digest_text(DATED)}))
    made = make(plain, roles=role)
    assert made.template_date == "2024-07-26"
    assert made.model_roles != before.model_roles
    (adapter / "chat_template.jinja").write_text("another")
    with pytest.raises(InputError, match=r"mine/chat_template\.jinja: is not the chat template that lorasweep\.json"):
        make(plain, roles=role)
