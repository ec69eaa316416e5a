"""Snakemake in a SLURM job: it starts in half the time, since it leaves out what a job has no use for.

    python snakemake_in_job.py -m snakemake --snakefile Snakefile ...

At its start, Snakemake imports every plugin of every kind. The SLURM plugin imports pandas, and asks `scontrol` for the
cluster's configuration (`get_min_job_age`); the reports' plugin imports docutils and numpy. The job of one rule submits
no jobs and writes no report. Some libraries import numpy and requests where they are installed, and do without them
else. Imported before Snakemake, so the standard library alone.
"""

import contextlib
import gc
import os
import pkgutil
import sys
from collections.abc import Iterator
from typing import Any

UNUSED = ("snakemake_executor_plugin_slurm", "snakemake_executor_plugin_slurm_jobstep")
"""Plugins that are not imported."""

OPTIONAL = ("numpy", "requests")
"""Packages that are not imported: yte would convert numpy's arrays, and smart_open would read files from the web."""


def leave_out_modules() -> None:
    """Have Snakemake not find plugins and packages that a job has no use for."""
    list_modules = pkgutil.iter_modules
    # Listed once: each registry asks again.
    modules = [module for module in list_modules() if module.name not in UNUSED]

    def iter_modules(*arguments: Any, **options: Any) -> Iterator[pkgutil.ModuleInfo]:
        return list_modules(*arguments, **options) if arguments or options else iter(modules)

    pkgutil.iter_modules = iter_modules
    for name in OPTIONAL:
        sys.modules[name] = None  # type: ignore[assignment]  # its import fails
    with contextlib.suppress(ImportError):
        from snakemake_interface_report_plugins.registry import ReportPluginRegistry

        ReportPluginRegistry.collect_plugins = lambda self: setattr(self, "plugins", {})


if __name__ == "__main__":
    sys.argv[:3] = ["snakemake"]
    sys.path[0] = os.getcwd()  # as with -m: this file's folder has modules with names of others
    # The objects of a short process are not garbage: half a second of imports would be spent on looking.
    gc.set_threshold(100_000, 20, 20)
    leave_out_modules()
    from snakemake.cli import main

    main()
