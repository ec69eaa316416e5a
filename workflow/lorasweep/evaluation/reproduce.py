"""The page `eval/reproduce.py` of a point: plain Python that runs the point's evaluation again.

It is written when an evaluation begins, so that a failed one has it too. No rule declares it as an output, since
Snakemake deletes the outputs of a failed job.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from pprint import pformat
from string import Template
from textwrap import indent
from typing import Any

from lorasweep.adapters.identity import digest_config
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, METRICS, REPRODUCTION, find_part
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record, write_aside
from lorasweep.util.versions import get_versions

_PAGE = Template('''\
"""Evaluate this point again, and compare the scores with those in the metrics.json beside this file.

Call it where Snakemake ran, with the evaluation environment of a clone of lorasweep. CLONE is the clone's folder.
`--base` is for a base model that is elsewhere:

    CLONE/scripts/run $stage $page [NEW FOLDER FOR INSPECT'S LOGS] [--base FOLDER]

The exit status is 0 if the scores are the same.
"""

# mode:     $mode
# base:     $base
# adapter:  $adapter
# tasks:    $tasks
# options:  $options
# versions: $versions

import sys
import tempfile
from pathlib import Path

from lorasweep.checkpoints.checkpoint import read_checkpoint
${imports}from lorasweep.evaluation.inspect_tasks import run_task
from lorasweep.evaluation.placement import take_gpus
from lorasweep.evaluation.reproduce import compare, read_arguments
from lorasweep.evaluation.roles import open_roles
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import find_part
from lorasweep.util.errors import call_to_the_end
from lorasweep.util.process import end_on_sigterm

POINT = Path(__file__).parents[1]

# All settings of the evaluation.
SPEC = EvaluationSpec.model_validate(
$spec
)


def main():
    end_on_sigterm(outlives_parent=True)
    spec, logs = read_arguments(SPEC)
    take_gpus(spec, spec.gpus)
    base = read_checkpoint(Path(spec.base_model), spec.chat_template)
    open_roles(spec)
    with tempfile.TemporaryDirectory() as folder:
$model
        logs = logs or Path(folder, "logs")
        scores = {}
        for task in spec.tasks:
            _, result = run_task(spec, task, model, logs / task.name, POINT.name, metadata={})
            scores[task.name] = result["scores"]
    if not compare(spec, POINT, scores):
        sys.exit(1)


call_to_the_end(main, "reproduce.py: ")
''')

_MODES = {
    "A": "standard (A): the full model in hf_model/",
    "B1": "merge (B1): adapter and base are merged into a temporary model in TMPDIR, which is deleted afterwards",
    "B2": "direct (B2): base and adapter in memory",
    "base": "the base model alone",
}

_OPTIONS = ("dtype", "device", "max_connections", "max_tokens", "temperature", "seed")
"""The options in the head of the page. `SPEC` has the others: prompts, and those of each task."""

_MAKE = "from lorasweep.evaluation.evaluate import make_model\n"
_SERVE = "from lorasweep.evaluation.vllm import make_served_model\n"

_OPENINGS = {
    ("A", "hf"): (
        _MAKE,
        'model = make_model(spec, f"hf/{POINT.name}", base, model_path=str(find_part(POINT, "hf_model")))',
    ),
    ("B1", "hf"): (
        f"from lorasweep.adapters.merge import merge\n{_MAKE}",
        'merged = Path(folder, "merged")\n'
        'merge(base.path, find_part(POINT, "adapter"), merged, spec.dtype, temporary=True)\n'
        'model = make_model(spec, f"hf/{POINT.name}", base, model_path=str(merged))',
    ),
    ("B2", "hf"): (
        f"import lorasweep.evaluation.provider  # registers lorasweep/... with Inspect\n{_MAKE}",
        'adapter = str(find_part(POINT, "adapter"))\n'
        'model = make_model(spec, f"lorasweep/{POINT.name}", base, base=str(base.path), adapter=adapter)',
    ),
    ("base", "hf"): (
        _MAKE,
        'model = make_model(spec, f"hf/{POINT.name}", base, model_path=str(base.path))',
    ),
    ("B2", "vllm"): (
        f"from lorasweep.adapters.adapter import read_adapter\n{_SERVE}",
        'adapter = read_adapter(find_part(POINT, "adapter"), base)\n'
        "model = make_served_model(spec, base, adapter, [adapter])",
    ),
    ("base", "vllm"): (
        _SERVE,
        "model = make_served_model(spec, base, None, ())",
    ),
}
"""The lines that import what opens the model, and those that open it, by mode and backend."""


def write_reproduction(spec: EvaluationSpec, point: Path, versions: Mapping[str, str]) -> None:
    """Write the page of a point's evaluation. `versions` are those of the packages that run it."""
    page = point / "eval" / REPRODUCTION
    imports, opening = _OPENINGS[spec.mode, spec.backend]
    # The number of GPUs is not part of what the specification is known by.
    settings = spec.model_dump(mode="json") | ({"gpus": spec.gpus} if spec.gpus > 1 else {})
    values = {
        "stage": "vllm" if spec.backend == "vllm" else "eval",
        "page": page,
        "mode": _MODES[spec.mode] + (", served by vLLM" if spec.backend == "vllm" else ""),
        "base": spec.base_model,
        "adapter": point / "adapter" if spec.mode != "base" else "none",
        "tasks": ", ".join(task.task for task in spec.tasks),
        "options": ", ".join(f"{name} {getattr(spec, name)}" for name in _OPTIONS),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "imports": imports,
        "spec": indent(pformat(settings, width=116, sort_dicts=False), " " * 4),
        "model": indent(opening, " " * 8),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    write_aside(page, _PAGE.substitute(values))


def read_arguments(spec: EvaluationSpec) -> tuple[EvaluationSpec, Path | None]:
    """Read the command line of a page: return the specification with the base model's folder, and that for the logs.

    Raises:
        InputError: the folder for the logs has files: Inspect would go on with the logs there, and evaluate nothing.
    """
    parser = argparse.ArgumentParser(description="Evaluate this point again, and compare the scores.")
    parser.add_argument("logs", nargs="?", type=Path, help="a new folder for Inspect's logs (default: temporary)")
    parser.add_argument("--base", help="the base model's folder (default: where it was)")
    arguments = parser.parse_args()
    if (logs := arguments.logs) and logs.exists() and (not logs.is_dir() or any(logs.iterdir())):
        raise InputError(f"{logs}: exists, and is not an empty folder", "a new folder for Inspect's logs")
    return spec.model_copy(update={"base_model": arguments.base or spec.base_model}), arguments.logs


def compare(spec: EvaluationSpec, point: Path, scores: Mapping[str, Mapping[str, float]]) -> bool:
    """Print the scores of each task beside those that the point records; return whether they are the same.

    If they differ, print what has changed since the evaluation.
    """
    recorded = find_record(point / "eval" / METRICS)
    if recorded.get("evaluation_sha256") != spec.sha256:
        print(f"{point.name}: no scores of this evaluation are recorded", *_list(scores), sep="\n")
        return False
    before = {task: result["scores"] for task, result in recorded["tasks"].items()}
    print("Recorded:", *_list(before), "Now:", *_list(scores), sep="\n")
    # As JSON, since NaN is not equal to NaN.
    is_same = json.dumps(before, sort_keys=True) == json.dumps(scores, sort_keys=True)
    print("The scores are those recorded." if is_same else "The scores are not those recorded.")
    for change in () if is_same else _find_changes(spec, point, recorded):
        print(f"Changed since: {change}")
    return is_same


def _list(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [f"  {task} {name}: {value}" for task, metrics in scores.items() for name, value in metrics.items()]


def _find_changes(spec: EvaluationSpec, point: Path, recorded: Mapping[str, Any]) -> Iterator[str]:
    """Yield what an evaluation depends on and differs from that of the recorded one."""
    if read_checkpoint(Path(spec.base_model)).fingerprint != spec.base_fingerprint:
        yield f"the base model {spec.base_model}"
    adapter = find_part(point, "adapter")
    if recorded["adapter_sha256"] and digest_file(adapter / ADAPTER_WEIGHTS) != recorded["adapter_sha256"]:
        yield str(adapter / ADAPTER_WEIGHTS)
    config = digest_config(adapter)
    if recorded.get("adapter_config_sha256", config) != config:
        yield str(adapter / ADAPTER_CONFIG)
    yield from (file for file, digest in spec.files.items() if digest_file(Path(file)) != digest)
    for package, version in sorted(recorded["versions"].items()):
        now = get_versions(package).get(package, "not installed")
        if now != version:
            yield f"{package} {version}, now {now}"
