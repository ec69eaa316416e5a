"""Results: the manifest of each point, the tables of all points, and the report.

In: the files that the points keep. Out: `manifest.json` per point; `samples.parquet`, the scores of all samples;
`results.csv` (one row per point and task), `replicates.csv` (one row per setting and task) and `answer.json`;
`report.html` and `plots/`.
"""


localrules:
    cleanup,
    read_samples,
    collect,
    report,


rule cleanup:
    input:
        unpack(inputs("cleanup", SWEEP.get_kept_files)),
    output:
        manifest="<results>/{point}/manifest.json",
    log:
        "<logs>/cleanup/{point}.log",
    # Before all other jobs, so that a finished point counts even if the run is stopped.
    priority: 20
    params:
        settings=of(SWEEP.get_settings),
        point=in_results("{point}"),
        benchmarks=in_results("benchmarks"),
        tasks=of(SWEEP.get_task_names),
        options=of(SWEEP.get_cleanup_options),
    run:
        settings = ["--settings", params.settings, "--tasks", params.tasks, params.options]
        run_here("cleanup", log[0], "--point", params.point, "--benchmarks", params.benchmarks, *settings)


rule read_samples:
    input:
        manifests=inputs("read_samples", get_manifests),
    output:
        samples="<results>/samples.parquet",
    log:
        "<logs>/read_samples.log",
    conda:
        "../../envs/eval.yaml"
    params:
        results=in_results(),
        options=SWEEP.reading_options,
        baselines=list(SWEEP.baselines),
    shell:
        f"{RUN} eval -m lorasweep job read_samples --results {{params.results:q}} {{params.options:q}}"
        " --baselines {params.baselines:q} --output {output.samples:q} > {log:q} 2>&1"


rule collect:
    input:
        manifests=inputs("collect", get_manifests),
        samples=inputs("collect", lambda _: "<results>/samples.parquet"),
    output:
        table="<results>/results.csv",
        parquet="<results>/results.parquet",
        replicates="<results>/replicates.csv",
        answer="<results>/answer.json",
    log:
        "<logs>/collect.log",
    conda:
        "../../envs/driver.yaml"
    params:
        results=in_results(),
        variables=SWEEP.variables,
        tasks=SWEEP.deciding_tasks,
        report=EXPERIMENT.report.model_dump_json(),
        baselines=list(SWEEP.baselines),
    shell:
        f"{RUN} driver -m lorasweep job collect --results {{params.results:q}} --samples {{input.samples:q}}"
        " --variables {params.variables:q} --tasks {params.tasks:q} --report {params.report:q}"
        " --baselines {params.baselines:q} --output {output.table:q} > {log:q} 2>&1"


rule report:
    input:
        unpack(inputs("report", get_tables)),
    output:
        page="<results>/report.html",
        plots=directory("<results>/plots"),
        record=f"<results>/{TABLES_RECORD}",
    log:
        "<logs>/report.log",
    conda:
        "../../envs/driver.yaml"
    params:
        pipeline=SWEEP.pipeline,
        settings=SWEEP.summary_settings,
        baselines=list(SWEEP.baselines),
    shell:
        f"{RUN} driver -m lorasweep job report --table {{input.table:q}} --pipeline {{params.pipeline:q}}"
        " --output {output.page:q} --plots {output.plots:q} --record {output.record:q} --settings {params.settings:q}"
        " --baselines {params.baselines:q} > {log:q} 2>&1"
