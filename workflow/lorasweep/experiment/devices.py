"""The devices that a plan can assume, with their peak performance and memory."""

from lorasweep.experiment.sections import Device, Experiment
from lorasweep.util.errors import InputError, nearest

DEVICES = {
    "a40": Device(bf16_flops=150e12, fp32_flops=37e12, bandwidth=0.70e12, memory=48e9),
    "a100": Device(bf16_flops=312e12, fp32_flops=19.5e12, bandwidth=2.0e12, memory=80e9),
    "l40s": Device(bf16_flops=362e12, fp32_flops=92e12, bandwidth=0.86e12, memory=48e9),
    "h100": Device(bf16_flops=989e12, fp32_flops=67e12, bandwidth=3.35e12, memory=80e9),
    "h200": Device(bf16_flops=989e12, fp32_flops=67e12, bandwidth=4.8e12, memory=141e9),
    "b200": Device(bf16_flops=2250e12, fp32_flops=75e12, bandwidth=8.0e12, memory=180e9),
    "rtx4090": Device(bf16_flops=165e12, fp32_flops=83e12, bandwidth=1.0e12, memory=24e9),
    "cpu": Device(bf16_flops=0.1e12, fp32_flops=0.2e12, bandwidth=20e9),
}
"""Dense peak performance from the vendors' data sheets (SXM variants, if several); `cpu`: two cores of a server."""

DEFAULT_DEVICES = {"cuda": "a100", "cpu": "cpu"}


def get_device_name(experiment: Experiment) -> str:
    """Return the name of the device that the plan assumes."""
    return experiment.plan.device or DEFAULT_DEVICES[experiment.model.device]


def get_device(experiment: Experiment) -> Device:
    """Return the device that the plan assumes."""
    return {**DEVICES, **experiment.plan.devices}[get_device_name(experiment)]


def check_device(experiment: Experiment) -> None:
    """Check that the plan's device is known, with its memory if the number of GPUs depends on that.

    Raises:
        InputError: The device is neither in `DEVICES` nor in `plan.devices`, or its memory is needed and not known.
    """
    device, devices = experiment.plan.device, {**DEVICES, **experiment.plan.devices}
    if device and device not in devices:
        raise InputError(
            f"plan.device: {device!r} is not known{nearest(device, devices)}",
            f"{', '.join(devices)}, or a name under plan.devices",
        )
    if (
        experiment.model.device == "cuda"
        and experiment.evaluation.gpus == "auto"
        and get_device(experiment).memory is None
    ):
        raise InputError(
            f"evaluation.gpus: 'auto' needs the memory of the device {get_device_name(experiment)!r}",
            f"a number of GPUs, or plan.devices.{get_device_name(experiment)}.memory in bytes",
        )
