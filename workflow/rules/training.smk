"""Training: one adapter a point.

In: the recipe, and the training data (whose digest is in the recipe). Out: `adapter/`, which PEFT and transformers
load as it lies there. What the trainer needs only while it runs lies in `state/`, which is no output: Snakemake
deletes the outputs of a failed job.
"""


rule train:
    input:
        recipe="<results>/{point}/recipe.yaml",
        data=ancient(EXPERIMENT.data.train),
        script=f"{SCRIPTS}/train.py",
    output:
        adapter=get_adapter_files("{point}"),
    log:
        "<logs>/train/{point}.log",
    benchmark:
        "<benchmarks>/train/{point}.tsv"
    conda:
        "../../envs/train.yaml"
    threads: 4
    resources:
        **get_orphan_dependency(),
        mem_mb=train_mem_mb,
        runtime=train_runtime,
        disk_mb=train_disk_mb,
        gpu=GPUS,
    params:
        adapter=get_adapter_folder,
    shell:
        f"{RUN} train {{input.script:q}} --recipe {{input.recipe:q}} --adapter {{params.adapter:q}}" " > {log:q} 2>&1"
