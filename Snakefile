"""lorasweep: sweeps of LoRA fine-tuning, from one experiment file to one table.

configure → train → take → [merge | export] → evaluate → cleanup → collect
"""

from snakemake.utils import min_version

min_version("9.27.1")


# A file given with --configfile replaces the default experiment; nothing of the default leaks into it.
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
        get_recipes,
