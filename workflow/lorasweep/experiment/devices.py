"""The devices that a plan can assume, with their peak performance."""

from lorasweep.experiment.sections import Device, Experiment
from lorasweep.util.errors import InputError, nearest

DEVICES = {
    "a40": Device(bf16_flops=150e12, fp32_flops=37e12, bandwidth=0.70e12),
    "a100": Device(bf16_flops=312e12, fp32_flops=19.5e12, bandwidth=2.0e12),
    "l40s": Device(bf16_flops=362e12, fp32_flops=92e12, bandwidth=0.86e12),
    "h100": Device(bf16_flops=989e12, fp32_flops=67e12, bandwidth=3.35e12),
    "h200": Device(bf16_flops=989e12, fp32_flops=67e12, bandwidth=4.8e12),
    "b200": Device(bf16_flops=2250e12, fp32_flops=75e12, bandwidth=8.0e12),
    "rtx4090": Device(bf16_flops=165e12, fp32_flops=83e12, bandwidth=1.0e12),
    "cpu": Device(bf16_flops=0.1e12, fp32_flops=0.2e12, bandwidth=20e9),
}
"""Dense peak performance from the vendors' data sheets (SXM variants, if several); `cpu`: two cores of a server."""

DEFAULT_DEVICES = {"cuda": "a100", "cpu": "cpu"}


def check_device(experiment: Experiment) -> None:
    """Check that the plan's device is known.

    Raises:
        InputError: The device is neither in `DEVICES` nor in `plan.devices`.
    """
    device, devices = experiment.plan.device, {**DEVICES, **experiment.plan.devices}
    if device and device not in devices:
        raise InputError(
            f"plan.device: {device!r} is not known{nearest(device, devices)}",
            f"{', '.join(devices)}, or a name under plan.devices",
        )
