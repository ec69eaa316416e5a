"""Merging: merge the base model and an adapter to a full model that is kept (mode A).

In: the adapter. Out: `hf_model/`, a full model without adapter files.
In mode B1, the evaluation job merges a temporary model itself: see evaluation.smk.
"""


rule merge:
    input:
        adapter=SWEEP.get_adapter_files("{point}"),
    output:
        model=directory("<results>/{point}/hf_model"),
    log:
        "<logs>/merge/{point}.log",
    benchmark:
        "<benchmarks>/merge/{point}.tsv"
    conda:
        "../../envs/eval.yaml"
    threads: 2
    resources:
        mem_mb=request("merge", "mem_mb"),
        runtime=request("merge", "runtime"),
        disk_mb=request("merge", "disk_mb"),
    params:
        adapter=in_results("{point}/adapter"),
        base=SWEEP.base_model,
        dtype=EXPERIMENT.model.dtype,
    shell:
        f"{RUN} eval -m lorasweep job merge --base {{params.base:q}} --adapter {{params.adapter:q}} --output {{output.model:q}}"
        " --dtype {params.dtype:q} --threads {threads} --verify > {log:q} 2>&1"
