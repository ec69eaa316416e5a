"""Where a model is: on a CPU, on one GPU, or spread over the GPUs of a job."""

import os
from typing import Any

import torch

from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.util.errors import InputError


def take_gpus(spec: EvaluationSpec, gpus: int) -> EvaluationSpec:
    """Return the spec for a model on so many GPUs. If several, this process and its children see only the first ones.

    To be called before CUDA is used: the driver reads the environment once.

    Raises:
        InputError: the job has fewer GPUs.
    """
    if gpus <= 1:
        return spec
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(map(str, range(gpus))) if visible is None else visible.split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[:gpus])
    if (seen := torch.cuda.device_count()) < gpus:
        raise InputError(
            f"evaluation.gpus is {gpus}, but this job sees {seen}",
            "as many GPUs in the request of the rule (resource gpu, or gres in a profile)",
        )
    return spec.model_copy(update={"gpus": gpus})


def refuse_offload(model: Any) -> None:
    """Refuse a transformers model that was spread over GPUs and did not fit: each token would then read a disk.

    Raises:
        InputError: parts of the model are on the CPU or on disk.
    """
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if len(places) > 1 and (outside := sorted(places & {"cpu", "disk"})):
        raise InputError(
            f"the memory of {len(places) - len(outside)} GPUs is not enough for the model: parts of it would be on "
            f"{' and '.join(outside)}",
            "a larger evaluation.gpus",
        )
