"""Which epoch a task chooses by its scores, what is kept of that, and what is refused."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from evaluation_specs import make_spec
from lorasweep.evaluation import epoch_choice
from lorasweep.evaluation.epoch_choice import choose_epoch
from lorasweep.evaluation.inspect_tasks import EvaluationError
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.state import EvaluationState
from lorasweep.util.errors import InputError

Choose = Callable[..., dict[str, Any]]


def digest(epoch: int) -> str:
    return hashlib.sha256(f"weights {epoch}".encode()).hexdigest()


@pytest.fixture
def choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Choose:
    """Choose from epochs with these scores, as if they had been evaluated; return the record of what is kept."""

    def choose(scores: Sequence[dict[str, Any]], **options: Any) -> dict[str, Any]:
        training = tmp_path / "training"
        last = len(scores)
        for epoch in range(1, last + 1):
            folder = training / ("epoch=last" if epoch == last else f"epoch={epoch}")
            folder.mkdir(parents=True)
            (folder / "adapter_model.safetensors").write_text(f"weights {epoch}")
            (folder / "training_log.csv").write_text(f"the log of {epoch} epochs")
            (folder / "lorasweep.json").write_text(json.dumps({"epochs": epoch, "adapter_sha256": digest(epoch)}))

        def pretend_to_evaluate(spec: EvaluationSpec, points: Sequence[Path]) -> dict[str, str]:
            for values, point in zip(scores, points, strict=True):
                state = EvaluationState(spec, point)
                state.begin({})
                log = state.get_log_dir("a") / "1.eval"
                log.parent.mkdir(parents=True)
                log.write_text("log")
                state.finish({"a": log}, {"tasks": {"a": {"scores": values, "samples": 12, "seconds": 1.0}}})
            return {}

        monkeypatch.setattr(epoch_choice, "evaluate_adapters", pretend_to_evaluate)
        epoch = choose_epoch(make_spec(), training, last, **options)
        assert {path.name for path in training.iterdir()} == {"adapter", "state"}
        assert (training / "adapter/adapter_model.safetensors").read_text() == f"weights {epoch}"
        assert (training / "adapter/training_log.csv").read_text() == f"the log of {last} epochs"
        record: dict[str, Any] = json.loads((training / "adapter/lorasweep.json").read_text())
        assert record["epochs"] == record["best_epoch"]["epoch"] == epoch
        return record

    return choose


def make_scores(*values: float) -> list[dict[str, Any]]:
    return [{"match/accuracy": value, "match/stderr": value / 10, "match/std": 1 - value} for value in values]


@pytest.mark.parametrize(
    ("values", "options", "epoch"),
    [
        ((0.2, 0.9, 0.5), {}, 2),
        ((0.2, 0.5, 0.9), {}, 3),
        ((0.2, 0.9, 0.9), {}, 2),
        ((0.5, 0.5, 0.5), {}, 1),
        ((0.9, 0.2, 0.5), {"higher_is_better": False}, 2),
        ((0.9, 0.2, 0.2), {"higher_is_better": False}, 2),
        ((0.9, 0.2, 0.5), {"metric": "match/std"}, 2),
        ((0.7,), {}, 1),
    ],
)
def test_the_best_score_decides_and_of_equal_ones_the_earliest_epoch(
    choose: Choose, values: tuple[float, ...], options: dict[str, Any], epoch: int
) -> None:
    assert choose(make_scores(*values), **options)["best_epoch"]["epoch"] == epoch


def test_the_record_has_the_scores_of_all_epochs(choose: Choose) -> None:
    chosen = choose(make_scores(0.2, 0.9, 0.5))["best_epoch"]
    assert chosen == {
        "epoch": 2,
        "epochs_trained": 3,
        "task": {"name": "a", "task": "a.py", "args": {}, "limit": None},
        "metric": "match/accuracy",
        "higher_is_better": True,
        "evaluation_sha256": make_spec().sha256,
        "score": 0.9,
        "standard_error": 0.09,
        "scores": [
            {
                "epoch": epoch,
                "score": score,
                "standard_error": pytest.approx(score / 10),
                "samples": 12,
                "adapter_sha256": digest(epoch),
            }
            for epoch, score in ((1, 0.2), (2, 0.9), (3, 0.5))
        ],
    }


def test_a_metric_that_is_no_mean_has_no_standard_error(choose: Choose) -> None:
    assert choose(make_scores(0.2, 0.9), metric="match/std")["best_epoch"]["standard_error"] is None


def test_no_epoch_is_deleted_if_the_choice_fails(choose: Choose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'match/acuracy' is no metric of the task 'a'\. Expected: match/accuracy, m"):
        choose(make_scores(0.2, 0.9), metric="match/acuracy")
    assert {path.name for path in (tmp_path / "training").iterdir()} == {"epoch=1", "epoch=last", "state"}


def test_a_score_that_is_no_number_is_no_score(choose: Choose) -> None:
    with pytest.raises(EvaluationError, match="epoch 2: match/accuracy of 'a' is nan, no finite number"):
        choose(make_scores(0.2, float("nan")))


def test_an_epoch_that_cannot_be_scored_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epoch_choice, "evaluate_adapters", lambda spec, points: {points[1].name: "no such file"})
    with pytest.raises(EvaluationError, match="epoch=2: no such file"):
        choose_epoch(make_spec(), tmp_path, 2)
