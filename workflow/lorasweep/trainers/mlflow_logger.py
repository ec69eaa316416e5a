"""A metric logger for MLflow, which torchtune has none for, and which both trainers use."""

from collections.abc import Iterator, Mapping
from time import time
from typing import Any

_PARAMETERS = 100
"""The most parameters that MLflow takes at a time."""


class MLflowLogger:
    """A run of MLflow, where `MLFLOW_TRACKING_URI` says.

    Args:
        experiment: name of MLflow's experiment, which is made if it is not there.
        name: name of the run.
        settings: parameters of the run; keys of mappings in it are joined by dots.
    """

    def __init__(self, experiment: str, name: str, settings: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        self._run = self._client.create_run(mlflow.set_experiment(experiment).experiment_id, run_name=name).info.run_id
        parameters = [Param(key, str(value)) for key, value in _flatten(settings)]
        for start in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(self._run, params=parameters[start : start + _PARAMETERS])

    def log_dict(self, values: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step, by name."""
        from mlflow.entities import Metric

        now = round(1000 * time())
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
