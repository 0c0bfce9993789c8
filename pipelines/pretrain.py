"""`pirl-pretrain`: images in, an evaluated and registered trunk out.

    shard -> pretrain -> linear_eval -> gate -> register -> report
                                          `-----else-----> report (why not)

Steps hand each other URIs; whatever is large stays in storage. Every step can be repeated: it finds its work done.
"""

from kfp import dsl

from components.gate import gate
from components.linear_eval import linear_eval
from components.pretrain import pretrain
from components.register import register
from components.report import report
from components.shard import shard


@dsl.pipeline(
    name="pirl-pretrain", description="Self-supervised pretraining with PIRL: images in, a registered trunk out"
)
def pirl_pretrain(
    train_source: str,
    test_source: str,
    root: str,
    run: str,
    recipe: str,
    overrides: str = "",
    processes: int = 0,
    model: str = "pirl",
    metric: str = "linear_1pct",
    min_gain: float = 0.01,
) -> None:
    """Everything goes below `root` (a folder or an s3:// prefix): data/, runs/RUN/, registry/MODEL/."""
    train_data = shard(source=train_source, root=root, run=run, split="train").set_display_name("shard-train")
    test_data = shard(source=test_source, root=root, run=run, split="test").set_display_name("shard-test")
    trained = pretrain(
        data=train_data.output, root=root, run=run, recipe=recipe, overrides=overrides, processes=processes
    )
    evaluated = linear_eval(run=trained.output, train_data=train_data.output, test_data=test_data.output)
    checked = gate(run=evaluated.outputs["Output"], root=root, model=model, metric=metric, min_gain=min_gain)
    data = {"train_data": train_data.output, "test_data": test_data.output}
    # both branches, on a parameter that is the gate's only output: the local runner skips any other shape silently
    with dsl.If(checked.output == "promote", name="promote"):
        registered = register(run=trained.output, root=root, model=model)
        shown = report(run=trained.output, verdict=registered.outputs["Output"], **data)
    with dsl.Else(name="reject"):
        explained = report(run=trained.output, verdict=checked.output, **data)
    for task in (train_data, test_data, trained, evaluated, checked, registered, shown, explained):
        task.set_caching_options(False)  # what a step finds done, it skips itself, by content
