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
    params:
        recipe=of(SWEEP.get_recipe),
    run:
        write_here("configure", log[0], output.recipe, params.recipe)
