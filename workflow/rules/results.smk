"""Results: what stays of a point, and the table of all points.

In: everything a point keeps. Out: `manifest.json` a point, and `results.csv`.
"""


localrules:
    cleanup,
    collect,


rule cleanup:
    input:
        unpack(get_kept_files),
        script=f"{SCRIPTS}/cleanup.py",
    output:
        manifest="<results>/{point}/manifest.json",
    log:
        "<logs>/cleanup/{point}.log",
    conda:
        "../../envs/driver.yaml"
    params:
        settings=get_settings,
        point=get_point_folder,
        benchmarks=get_benchmarks_folder,
        tasks=get_task_names,
    shell:
        f"{RUN} driver {{input.script:q}} --point {{params.point:q}} --benchmarks {{params.benchmarks:q}}"
        " --settings {params.settings:q} --tasks {params.tasks:q} > {log:q} 2>&1"


rule collect:
    input:
        manifests=expand("<results>/{point}/manifest.json", point=sorted({*POINTS, *EVALUATED})),
        script=f"{SCRIPTS}/collect.py",
    output:
        table="<results>/results.csv",
    log:
        "<logs>/collect.log",
    conda:
        "../../envs/driver.yaml"
    params:
        results=get_results_folder,
        variables=VARIABLES,
        baseline=" ".join(f"--baseline {name}" if name != BASELINE else "--baseline" for name in BASELINES),
    shell:
        f"{RUN} driver {{input.script:q}} --results {{params.results:q}} --output {{output.table:q}}"
        " {params.baseline} --variables {params.variables:q} > {log:q} 2>&1"
