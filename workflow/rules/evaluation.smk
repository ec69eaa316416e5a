"""Evaluation: every task of a point in one process, so that its model is loaded once.

In: the model that the point's mode makes; for the point `baseline`, the base model alone.
Out: one Inspect log a task, and `metrics.json`: the scores, and the proof that the adapter was applied.
"""


rule evaluate:
    # Before further merges: a merged model is deleted when it was evaluated.
    priority: 10
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
    params:
        spec=get_evaluation,
        point=f"{RESULTS}/{{point}}",
        probes=f"{RESULTS}/.probes",
    threads: 4
    resources:
        mem_mb=evaluate_mem_mb,
        runtime=evaluate_runtime,
        gpu=GPUS,
    conda:
        "../../envs/eval.yaml"
    shell:
        "{EVAL_PYTHON} {input.script:q} --spec {params.spec:q} --point {params.point:q} --probes {params.probes:q}"
        " > {log:q} 2>&1"
