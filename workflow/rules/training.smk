"""Training: one adapter a training; points take it, or, where they are given one that exists, a copy of that.

In: the recipe, and the training and validation data (whose digests are in the recipe). Out: `adapter/`, which PEFT and
transformers load as it lies there. What the trainer needs only while it runs lies in `state/`, which is no output:
Snakemake deletes the outputs of a failed job. How a training is watched is a resource, and no parameter: a change in
those reruns nothing.

Points that differ only in how their checkpoint is kept share a training. The first has a link to its weights, and the
others have copies: Snakemake gives a job's outputs a new time, which must be no other point's.
"""


localrules:
    take,
    adopt,


rule train:
    input:
        recipe=ancient("<results>/trainings/{training}/recipe.yaml"),
        data=ancient(EXPERIMENT.data.train or []),
        validation=ancient(EXPERIMENT.data.validation or []),
    output:
        # Last of all that a training leaves. The weights are no output: a point that has a link to them gives them its time.
        record=SWEEP.get_trained_file("{training}"),
    log:
        "<logs>/train/{training}.log",
    benchmark:
        "<benchmarks>/train/{training}.tsv"
    conda:
        f"../../envs/{SWEEP.trainer.STAGE}.yaml"
    threads: of(SWEEP.get_train_threads)
    resources:
        **get_orphan_dependency(),
        mem_mb=request("train", "mem_mb"),
        runtime=request("train", "runtime"),
        disk_mb=request("train", "disk_mb"),
        gpu=of(SWEEP.get_train_gpus),
        # All of its GPUs: SLURM may give them on several otherwise.
        nodes=1,
        metric_loggers=",".join(EXPERIMENT.training.metric_loggers),
        save_minutes=EXPERIMENT.training.save_minutes,
        epochs=of(SWEEP.get_epochs),
    params:
        adapter=f"{RESULTS}/trainings/{{training}}/adapter",
    shell:
        # The shell becomes the training, so that a signal to a job reaches what can save its state.
        f"exec {RUN} {SWEEP.trainer.STAGE} -m lorasweep job train --trainer {shlex.quote(EXPERIMENT.trainer)}"
        " --recipe {input.recipe:q} --adapter {params.adapter:q}"
        " --metric-loggers {resources.metric_loggers:q} --save-minutes {resources.save_minutes}"
        " --epochs {resources.epochs:q} > {log:q} 2>&1"


rule take:
    input:
        unpack(of(SWEEP.get_taken_files)),
    output:
        recipe="<results>/{point}/recipe.yaml",
        adapter=SWEEP.get_adapter_files("{point}"),
    log:
        "<logs>/take/{point}.log",
    wildcard_constraints:
        point=SWEEP.match_points(lambda point: point in POINTS and bool(POINTS[point].training)),
    # At once: what the training needed for itself goes.
    priority: 20
    conda:
        "../../envs/driver.yaml"
    params:
        source=of(SWEEP.get_taken_folder),
        point=in_results("{point}"),
        state=of(SWEEP.get_training_state),
    shell:
        f"{RUN} driver -m lorasweep job take --source {{params.source:q}} --recipe {{input.recipe:q}} --state {{params.state:q}}"
        " --point {params.point:q} > {log:q} 2>&1"


rule adopt:
    input:
        source=of(SWEEP.get_given_adapter),
    output:
        adapter=SWEEP.get_adapter_files("{point}"),
    log:
        "<logs>/adopt/{point}.log",
    wildcard_constraints:
        point=SWEEP.match_points(lambda point: point in POINTS and bool(POINTS[point].adapter)),
    conda:
        "../../envs/eval.yaml"
    params:
        source=of(lambda point: POINTS[point].adapter),
        adapter=in_results("{point}/adapter"),
        base=SWEEP.base_model,
        fingerprint=get_base_fingerprint,
    shell:
        f"{RUN} eval -m lorasweep job adopt --source {{params.source:q}} --adapter {{params.adapter:q}} --base {{params.base:q}}"
        " > {log:q} 2>&1"
