"""Snakemake that looks at its SLURM jobs every two seconds, and says at SIGUSR1 where each of its threads stands.

The executor plugin waits 10 s longer after each look that finds no job ended, which suits jobs of hours.
"""

import faulthandler
import signal

import snakemake_executor_plugin_slurm as plugin
from snakemake.cli import main

if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    plugin.Executor.next_seconds_between_status_checks = property(lambda executor: 2, lambda executor, seconds: None)
    main()
