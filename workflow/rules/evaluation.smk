"""Evaluation: every task of a point in one process, so that its model is loaded once.

In: the model that the point's mode makes; for the point `baseline`, the base model alone.
Out: one Inspect log a task, and `metrics.json`: the scores, and the proof that the adapter was applied.

In mode B1 one job merges, evaluates, and is done with the merged model: so `max_merged_models` bounds how many there
are, since a job that runs has one and no other has; and what Snakemake deletes of a job that failed is the merged
model too. It is a temporary output, or lies in the job's own temporary folder, as `merged_models_in` says.
"""


rule evaluate:
    input:
        unpack(get_evaluated_model),
        tasks=get_task_files(),
        script=f"{SCRIPTS}/evaluate.py",
    output:
        **get_evaluation_outputs(),
    log:
        "<logs>/evaluate/{point}.log",
    benchmark:
        "<benchmarks>/evaluate/{point}.tsv"
    wildcard_constraints:
        point=match_points(lambda point: EVALUATED.get(point) != "B1"),
    # Before further trainings: a point that is finished can be looked at.
    priority: 10
    conda:
        "../../envs/eval.yaml"
    threads: 4
    resources:
        mem_mb=evaluate_mem_mb,
        runtime=evaluate_runtime,
        gpu=GPUS,
    params:
        spec=get_evaluation,
        point=get_point_folder,
        probes=f"{RESULTS}/.probes",
    shell:
        f"{RUN} eval {{input.script:q}} --spec {{params.spec:q}} --point {{params.point:q}} --probes {{params.probes:q}}"
        " > {log:q} 2>&1"


rule evaluate_merged:
    input:
        adapter=get_adapter_files("{point}"),
        tasks=get_task_files(),
        script=f"{SCRIPTS}/evaluate.py",
    output:
        **get_evaluation_outputs(),
        **get_merged_output(),
    log:
        "<logs>/evaluate_merged/{point}.log",
    benchmark:
        "<benchmarks>/evaluate_merged/{point}.tsv"
    wildcard_constraints:
        point=match_points(lambda point: EVALUATED.get(point) == "B1"),
    priority: 10
    conda:
        "../../envs/eval.yaml"
    threads: 4
    resources:
        mem_mb=evaluate_merged_mem_mb,
        runtime=evaluate_merged_runtime,
        disk_mb=model_disk_mb,
        gpu=GPUS,
        merged_models=1,
    params:
        spec=get_evaluation,
        point=get_point_folder,
        probes=f"{RESULTS}/.probes",
    shell:
        f"{RUN} eval {{input.script:q}} --spec {{params.spec:q}} --point {{params.point:q}} --probes {{params.probes:q}}"
        f" --merge-in {MERGE_IN} --threads {{threads}} > {{log:q}} 2>&1"
