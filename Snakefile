"""lorasweep: sweeps of LoRA fine-tuning, from one experiment file to one table.

configure → train → take → [merge] → evaluate → cleanup → read_samples → collect → report
"""

from snakemake.utils import min_version

min_version("9.27.1")


# With --configfile, the default experiment is not loaded, so that none of its keys are merged in.
if not workflow.overwrite_configfiles:

    configfile: "config/experiment.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/run.smk"
include: "workflow/rules/configuration.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/merging.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/results.smk"


localrules:
    all,
    configure_all,


rule all:
    default_target: True
    input:
        get_results,


rule configure_all:
    input:
        inputs("configure_all", get_recipes),
