"""Evaluation: all tasks of a point in one process, so that its model is loaded once.

In: the full model of modes A and B1, or the adapter of mode B2; for a baseline, an existing model.
Out: `metrics.json`: the scores, and the proof that the adapter was applied. Beside it, and before it, one Inspect log per
task of the point. Points can have different tasks, and outputs of a rule cannot differ: so the logs are not declared.

In mode B2, one job evaluates a batch of points on one loaded base. It writes each point's result to the point's state
folder, which stays if the job fails. `publish` then moves the result to `eval/`, or fails with the point's own error.
Each run forms new batches of the points without a result.
"""


rule evaluate:
    input:
        unpack(inputs("evaluate", SWEEP.get_model_files)),
        tasks=ancient(of(SWEEP.get_task_files)),
    output:
        metrics=f"<results>/{{point}}/eval/{METRICS}",
    log:
        "<logs>/evaluate/{point}.log",
    benchmark:
        "<benchmarks>/evaluate/{point}.tsv"
    wildcard_constraints:
        point=SWEEP.match_points(lambda point: EVALUATED.get(point) in ("A", "B1", "base")),
    # Before merges, whose number is limited, and before further trainings.
    priority: 10
    conda:
        f"../../envs/{SWEEP.evaluation_stage}.yaml"
    threads: 4
    resources:
        **get_placement(),
        **request_memory("evaluate"),
        runtime=request("evaluate", "runtime"),
        gpu=of(SWEEP.get_evaluation_gpus),
        merged_models=lambda wildcards: int(EVALUATED[wildcards.point] == "B1"),
    params:
        spec=get_evaluation,
        point=in_results("{point}"),
        model=of(SWEEP.get_model_options),
        probes=f"{RESULTS}/.probes",
    shell:
        f"{RUN} {SWEEP.evaluation_stage} -m lorasweep job evaluate --spec {{params.spec:q}} --point {{params.point:q}}"
        " {params.model:q} --probes {params.probes:q} --gpus {resources.model_gpus} > {log:q} 2>&1"


localrules:
    publish,


rule evaluate_adapters:
    input:
        adapters=ancient(of(SWEEP.get_batch_adapters)),
        tasks=ancient(of(SWEEP.get_task_files)),
    output:
        batch=temp("<results>/.batches/{batch}"),
    log:
        "<logs>/evaluate_adapters/{batch}.log",
    benchmark:
        "<benchmarks>/evaluate_adapters/{batch}.tsv"
    priority: 10
    conda:
        f"../../envs/{SWEEP.evaluation_stage}.yaml"
    threads: 4
    resources:
        **get_placement(),
        **request_memory("evaluate_adapters"),
        runtime=request("evaluate_adapters", "runtime"),
        gpu=of(SWEEP.get_evaluation_gpus),
    params:
        spec=get_evaluation,
        points=of(SWEEP.get_batch_folders),
    shell:
        f"{RUN} {SWEEP.evaluation_stage} -m lorasweep job evaluate_adapters --spec {{params.spec:q}} --points {{params.points:q}}"
        " --output {output.batch:q} --gpus {resources.model_gpus} > {log:q} 2>&1"


rule publish:
    input:
        adapter=inputs("publish", SWEEP.get_adapter_files),
        tasks=ancient(of(SWEEP.get_task_files)),
        batch=inputs("publish", SWEEP.get_batch_file),
    output:
        metrics=f"<results>/{{point}}/eval/{METRICS}",
    log:
        "<logs>/publish/{point}.log",
    wildcard_constraints:
        point=SWEEP.match_points(lambda point: EVALUATED.get(point) == "B2"),
    priority: 20
    params:
        spec=get_evaluation,
        point=in_results("{point}"),
    run:
        run_here("publish", log[0], "--spec", params.spec, "--point", params.point)
