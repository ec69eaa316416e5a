"""Configuration: write the recipe of each training.

In: the experiment. Out: `recipe.yaml`, exactly what the trainer runs.
A training is named after its recipe, so that a changed recipe is a new training.
"""


localrules:
    configure,


rule configure:
    output:
        recipe="<results>/trainings/{training}/recipe.yaml",
    log:
        "<logs>/configure/{training}.log",
    conda:
        "../../envs/driver.yaml"
    params:
        recipe=of(SWEEP.get_recipe),
    shell:
        "printf '%s' {params.recipe:q} > {output.recipe:q} 2> {log:q}"
