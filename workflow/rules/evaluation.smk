"""Evaluation: every task of a point in one process, so that its model is loaded once.

In: the model that the point's mode makes; for the point `baseline`, the base model alone.
Out: one Inspect log a task, and `metrics.json`: the scores, and the proof that the adapter was applied.
"""


rule evaluate:
    input:
        unpack(get_evaluated_model),
        tasks=sorted({str(entry.file) for entry in TASKS if entry.file}),
        script=f"{SCRIPTS}/evaluate.py",
    output:
        logs=[f"<results>/{{point}}/eval/{entry.name}.eval" for entry in TASKS],
        metrics="<results>/{point}/eval/metrics.json",
    log:
        "<logs>/evaluate/{point}.log",
    benchmark:
        "<benchmarks>/evaluate/{point}.tsv"
    # Before further merges: a merged model is deleted when it was evaluated.
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
