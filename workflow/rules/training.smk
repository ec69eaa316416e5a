"""Training: train the adapters, and give each point its adapter: from a training, or a copy of an existing adapter.

In: the recipe, and the training and validation data (whose digests are in the recipe). Out: `adapter/`, in the format
of PEFT and transformers. The trainer's temporary files are in `state/`, which is not an output, since Snakemake deletes
the outputs of a failed job. Options for monitoring and saving are resources and not params, so that changing them does
not retrain.

If a task chooses the epoch of each training (`evaluation.validation_task`), `train` publishes the adapters of all
epochs, and `choose_epoch` scores them on one loaded base, publishes the best one as `adapter/`, and deletes them.

With `prune`, `train_part` trains up to each rung, an epoch after which settings are compared. It leaves the training's
state, the adapter of that epoch, and a record. `prune` reads the records of all trainings, and decides which go on. The
next part, and in the end `train`, reads the decision: a training that stops ends at once, without a GPU.

Points that differ only in how their checkpoint is kept share a training. The first point has a hard link to the
weights, the other points have copies: Snakemake updates the modification times of a job's outputs, and a link would
change the time of another point's file.
"""


localrules:
    take,
    adopt,


if not SWEEP.pruning_task:

    localrules:
        prune,


rule train:
    input:
        recipe=inputs("train", lambda training: f"<results>/trainings/{training}/recipe.yaml"),
        data=of(lambda training: ancient(SWEEP.get_data_files(training))),
        decision=inputs("train", SWEEP.get_awaited_decision),
    output:
        # The file that a training writes last. The weights are not an output: a point's link to them changes their time.
        record=SWEEP.get_trained_file("{training}"),
    log:
        "<logs>/train/{training}.log",
    benchmark:
        "<benchmarks>/train/{training}.tsv"
    conda:
        lambda wildcards: f"../../envs/{SWEEP.get_training_stage(wildcards[0])}.yaml"
    threads: of(SWEEP.get_train_threads)
    resources:
        **request_memory("train"),
        runtime=request("train", "runtime"),
        disk_mb=request("train", "disk_mb"),
        gpu=of(SWEEP.get_train_gpus),
        # All GPUs on one node: otherwise SLURM may spread them over several.
        nodes=1,
        model_gpus=of(SWEEP.get_training_gpus),
        metric_loggers=",".join(EXPERIMENT.training.metric_loggers),
        save_minutes=EXPERIMENT.training.save_minutes,
        epochs=of(SWEEP.get_epochs),
    params:
        adapter=f"{RESULTS}/trainings/{{training}}/{SWEEP.last_epoch_folder}",
        stage=of(SWEEP.get_training_stage),
        trainer=of(SWEEP.get_trainer),
        pruning=of(SWEEP.get_training_options),
    shell:
        # `exec` replaces the shell, so that a signal to the job reaches the training, which then saves its state.
        f"exec {RUN} {{params.stage}} -m lorasweep job train --trainer {{params.trainer:q}}"
        " --recipe {input.recipe:q} --adapter {params.adapter:q}"
        " --metric-loggers {resources.metric_loggers:q} --save-minutes {resources.save_minutes}"
        " --epochs {resources.epochs:q} {params.pruning:q} --gpus {resources.model_gpus} > {log:q} 2>&1"


use rule train as train_part with:
    input:
        recipe=inputs("train_part", lambda part: f"<results>/trainings/{split_part_name(part)[0]}/recipe.yaml"),
        data=of(lambda part: ancient(SWEEP.get_data_files(part))),
        decision=inputs("train_part", SWEEP.get_awaited_decision),
    output:
        record=f"<results>/{PRUNE}/{{part}}.json",
    log:
        "<logs>/train_part/{part}.log",
    benchmark:
        "<benchmarks>/train_part/{part}.tsv"
    resources:
        **request_memory("train_part"),
        runtime=request("train_part", "runtime"),
        disk_mb=request("train_part", "disk_mb"),
        gpu=of(SWEEP.get_train_gpus),
        nodes=1,
        model_gpus=of(SWEEP.get_training_gpus),
        metric_loggers=",".join(EXPERIMENT.training.metric_loggers),
        save_minutes=EXPERIMENT.training.save_minutes,
        epochs="last",
    params:
        adapter=lambda wildcards: f"{RESULTS}/trainings/{split_part_name(wildcards.part)[0]}/adapter",
        stage=of(SWEEP.get_training_stage),
        trainer=of(SWEEP.get_trainer),
        pruning=of(SWEEP.get_training_options),


rule prune:
    input:
        records=inputs("prune", SWEEP.get_rung_parts),
        earlier=inputs("prune", SWEEP.get_earlier_decision),
        tasks=ancient(SWEEP.pruning_task.files if SWEEP.pruning_task else []),
    output:
        decision=f"<results>/{PRUNE}/{{rung}}.json",
    log:
        "<logs>/prune/{rung}.log",
    benchmark:
        "<benchmarks>/prune/{rung}.tsv"
    # All trainings of the sweep wait for it.
    priority: 15
    conda:
        f"../../envs/{SWEEP.deciding_stage}.yaml"
    threads: 4 if SWEEP.pruning_task else 1
    resources:
        **request_memory("prune"),
        nodes=1,
        model_gpus=of(SWEEP.get_deciding_model_gpus),
        runtime=request("prune", "runtime"),
        gpu=of(SWEEP.get_deciding_gpus),
    params:
        results=in_results(),
        after=lambda wildcards: wildcards.rung.partition("=")[2],
    shell:
        f"{RUN} {SWEEP.deciding_stage} -m lorasweep job prune --results {{params.results:q}} --after {{params.after}}"
        " --gpus {resources.model_gpus} > {log:q} 2>&1"


rule choose_epoch:
    input:
        record=inputs("choose_epoch", SWEEP.get_trained_file),
        tasks=ancient(SWEEP.validation.files if SWEEP.validation else []),
    output:
        record=SWEEP.get_training_record("{training}"),
    log:
        "<logs>/choose_epoch/{training}.log",
    benchmark:
        "<benchmarks>/choose_epoch/{training}.tsv"
    wildcard_constraints:
        training=NAME_PATTERN if SWEEP.validation else "(?!)",
    # Before further trainings, as it deletes the adapters of a training's other epochs.
    priority: 15
    conda:
        f"../../envs/{SWEEP.evaluation_stage}.yaml"
    threads: 4
    resources:
        **get_placement(),
        **request_memory("choose_epoch"),
        runtime=request("choose_epoch", "runtime"),
        gpu=of(SWEEP.get_evaluation_gpus),
    params:
        spec=of(SWEEP.get_choice_spec),
        training=in_results("trainings/{training}"),
        options=of(SWEEP.get_choice_options),
    shell:
        f"{RUN} {SWEEP.evaluation_stage} -m lorasweep job choose_epoch --spec {{params.spec:q}} --training {{params.training:q}}"
        " {params.options:q} --gpus {resources.model_gpus} > {log:q} 2>&1"


rule take:
    input:
        unpack(inputs("take", SWEEP.get_taken_files)),
    output:
        recipe="<results>/{point}/recipe.yaml",
        adapter=SWEEP.get_adapter_files("{point}"),
    log:
        "<logs>/take/{point}.log",
    wildcard_constraints:
        point=SWEEP.match_points(lambda point: point in POINTS and bool(POINTS[point].training)),
    # As early as possible, since it removes the training's temporary files.
    priority: 20
    params:
        source=of(SWEEP.get_taken_folder),
        point=in_results("{point}"),
        state=of(SWEEP.get_training_state),
        choice=of(SWEEP.get_taking_options),
    run:
        arguments = [
            "--source",
            params.source,
            "--recipe",
            input.recipe,
            "--state",
            params.state,
            "--point",
            params.point,
        ]
        run_here("take", log[0], *arguments, params.choice)


rule adopt:
    input:
        source=inputs("adopt", SWEEP.get_given_adapter),
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
        base=of(SWEEP.get_model_path),
        fingerprint=of(SWEEP.get_fingerprint),
        template=of(SWEEP.get_adoption_options),
    shell:
        f"{RUN} eval -m lorasweep job adopt --source {{params.source:q}} --adapter {{params.adapter:q}} --base {{params.base:q}}"
        " {params.template:q} > {log:q} 2>&1"
