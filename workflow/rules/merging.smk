"""Merging: make a full model from the base model and an adapter, without a GPU.

In: the adapter. Out: a full model without adapter files.
`export` makes the model that mode A keeps. `merge` makes the model that mode B1 is evaluated on: a temporary output,
which Snakemake deletes when no job needs it any more. At most `max_merged_models` of these exist at a time: the
scheduler `lorasweep` starts no merge beyond that number (workflow/snakemake_scheduler_plugin_lorasweep).
"""


rule merge:
    input:
        adapter=inputs("merge", SWEEP.get_adapter_files),
    output:
        model=temp(directory(f"<results>/{MERGED}/{{point}}")),
    log:
        "<logs>/merge/{point}.log",
    benchmark:
        "<benchmarks>/merge/{point}.tsv"
    wildcard_constraints:
        point=SWEEP.match_points(lambda point: EVALUATED.get(point) == "B1"),
    # Before further trainings, as an evaluation waits for it.
    priority: 5
    conda:
        "../../envs/eval.yaml"
    threads: 2
    resources:
        **request_memory("merge"),
        runtime=request("merge", "runtime"),
        disk_mb=request("merge", "disk_mb"),
        merged_models=1,
    params:
        adapter=in_results("{point}/adapter"),
        base=of(SWEEP.get_model_path),
        dtype=of(SWEEP.get_dtype),
        option="--temporary",
    shell:
        f"{RUN} eval -m lorasweep job merge --base {{params.base:q}} --adapter {{params.adapter:q}} --output {{output.model:q}}"
        " --dtype {params.dtype:q} --threads {threads} {params.option} > {log:q} 2>&1"


use rule merge as export with:
    input:
        adapter=inputs("export", SWEEP.get_adapter_files),
    output:
        model=directory("<results>/{point}/hf_model"),
    log:
        "<logs>/export/{point}.log",
    benchmark:
        "<benchmarks>/export/{point}.tsv"
    wildcard_constraints:
        point=SWEEP.match_points(lambda point: point in POINTS and POINTS[point].mode == "A"),
    resources:
        **request_memory("merge"),
        runtime=request("merge", "runtime"),
        disk_mb=request("merge", "disk_mb"),
        merged_models=0,
    params:
        adapter=in_results("{point}/adapter"),
        base=of(SWEEP.get_model_path),
        dtype=of(SWEEP.get_dtype),
        option="--verify",
