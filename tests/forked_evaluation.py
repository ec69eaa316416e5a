"""Inspect's command and scripts of the evaluation, forked from a process that has imported what they need."""

from forked_python import PROCESSES, call, start

__all__ = ["call", "start"]

PROCESSES.set_forkserver_preload(
    ["inspect_ai._cli.main", "lorasweep.evaluation.adapted_model", "lorasweep.adapters.merge", "peft"]
)
