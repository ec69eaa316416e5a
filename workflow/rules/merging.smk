"""Merging: base model and adapter become one model.

In: the adapter. Out: `merged/`, which is deleted as soon as it was evaluated (mode B1), or `hf_model/`, which is
kept (mode A). The same code makes both.
"""


rule merge:
    input:
        adapter=get_adapter_files("{point}"),
        script=f"{SCRIPTS}/merge.py",
    output:
        model=temp(directory("<results>/{point}/merged")),
    log:
        "<logs>/merge/{point}.log",
    benchmark:
        "<benchmarks>/merge/{point}.tsv"
    conda:
        "../../envs/eval.yaml"
    threads: 2
    resources:
        mem_mb=merge_mem_mb,
        runtime=merge_runtime,
    params:
        adapter=get_adapter_folder,
        base=BASE_MODEL,
        dtype=EXPERIMENT.model.dtype,
    shell:
        f"{RUN} eval {{input.script:q}} --base {{params.base:q}} --adapter {{params.adapter:q}} --output {{output.model:q}}"
        " --dtype {params.dtype:q} > {log:q} 2>&1"


use rule merge as export with:
    output:
        model=directory("<results>/{point}/hf_model"),
    log:
        "<logs>/export/{point}.log",
    benchmark:
        "<benchmarks>/export/{point}.tsv"
