"""Training: one adapter a point, or, for a point that is given one that exists, a copy of it.

In: the recipe, and the training and validation data (whose digests are in the recipe). Out: `adapter/`, which PEFT and
transformers load as it lies there. What the trainer needs only while it runs lies in `state/`, which is no output:
Snakemake deletes the outputs of a failed job. How a training is watched is a resource, and no parameter: a change in
those reruns nothing.
"""


localrules:
    adopt,


for epochs in KEPT_EPOCHS:

    rule:
        name:
            TRAINING_RULES[epochs]
        input:
            recipe="<results>/{point}/recipe.yaml",
            data=ancient(EXPERIMENT.data.train or []),
            validation=ancient(EXPERIMENT.data.validation or []),
        output:
            adapter=get_adapter_files("{point}"),
            earlier=get_checkpoint_files(epochs),
        log:
            "<logs>/train/{point}.log",
        benchmark:
            "<benchmarks>/train/{point}.tsv"
        wildcard_constraints:
            point=SWEEP.match_points(lambda point: TRAINED.get(point) == epochs),
        conda:
            f"../../envs/{SWEEP.trainer.STAGE}.yaml"
        threads: get_train_threads
        resources:
            **get_orphan_dependency(),
            mem_mb=request("train", "mem_mb"),
            runtime=request("train", "runtime"),
            disk_mb=request("train", "disk_mb"),
            gpu=get_train_gpus,
            # All of its GPUs: SLURM may give them on several otherwise.
            nodes=1,
            metric_loggers=",".join(EXPERIMENT.training.metric_loggers),
            save_minutes=EXPERIMENT.training.save_minutes,
            epochs=",".join([*map(str, epochs), "last"]),
        params:
            adapter=get_adapter_folder,
        shell:
            # The shell becomes the training, so that a signal to a job reaches what can save its state.
            f"exec {RUN} {SWEEP.trainer.STAGE} -m lorasweep job train --trainer {shlex.quote(EXPERIMENT.trainer)}"
            " --recipe {input.recipe:q} --adapter {params.adapter:q}"
            " --metric-loggers {resources.metric_loggers:q} --save-minutes {resources.save_minutes}"
            " --epochs {resources.epochs:q} > {log:q} 2>&1"

    set_as_for_train(TRAINING_RULES[epochs])


rule adopt:
    input:
        source=get_given_adapter,
    output:
        adapter=get_adapter_files("{point}"),
    log:
        "<logs>/adopt/{point}.log",
    wildcard_constraints:
        point=SWEEP.match_points(lambda point: point in POINTS and bool(POINTS[point].adapter)),
    conda:
        "../../envs/eval.yaml"
    params:
        source=get_given_folder,
        adapter=get_adapter_folder,
        base=SWEEP.base_model,
        fingerprint=get_base_fingerprint,
    shell:
        f"{RUN} eval -m lorasweep job adopt --source {{params.source:q}} --adapter {{params.adapter:q}} --base {{params.base:q}}"
        " > {log:q} 2>&1"
