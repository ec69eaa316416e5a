"""Planning: what the sweep will take, before it is spent; and the ledger of what it did take.

In: the experiment, the base model's headers, and what earlier runs took. Out, of `snakemake plan`: tables, `plan.json`
and a picture of storage over time. A dry run ends with the plan in short; a run that has no room for what it is to do
is refused; what a run took is written down at its end.
"""


localrules:
    plan,


# Never run: the command begins anew as a dry run, see show_plan_instead.
rule plan:
    log:
        "<logs>/plan.log",
    conda:
        "../../envs/driver.yaml"
    shell:
        "false > {log:q} 2>&1"


if workflow.is_main_process:
    if "plan" in sys.argv[1:]:
        show_plan_instead()
    atexit.register(show_plan)
