"""Configuration: write what each point trains, before anything is spent.

In: the experiment. Out: `recipe.yaml`, exactly what the trainer runs.
The recipe itself is the parameter of the rule: a point is configured, and trained, anew when its recipe has
changed, and only then.
"""


localrules:
    configure,


rule configure:
    output:
        recipe="<results>/{point}/recipe.yaml",
    log:
        "<logs>/configure/{point}.log",
    conda:
        "../../envs/driver.yaml"
    params:
        recipe=get_recipe,
    shell:
        "printf '%s' {params.recipe:q} > {output.recipe:q} 2> {log:q}"
