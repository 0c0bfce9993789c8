"""The sharding as a step: images -> WebDataset shards with a manifest."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def shard(
    source: str,
    root: str,
    run: str,
    split: str,
    train_data: str = "",
    processes: int = 2,
    options: str = "",
    backend: str = "local",
    job: str = "",
    recipe: str = "",
    overrides: str = "",
    training: str = "",
    evaluation: str = "",
    model: str = "",
    metric: str = "",
    min_gain: float = 0.01,
    registry: str = "",
) -> str:
    """Shard `source` (a folder, a list of files, or fashion-mnist:SPLIT) to ROOT/data/SPLIT; return that URI.

    `options` (`pirl shard --help`) are NAME=VALUE items separated by blanks. Test images are compared with the shards
    `train_data`. The account's rights are checked where `backend` starts a job later on, and, with a `recipe`, the
    arguments of the later steps.
    """
    from components.step import step
    from pirl import shards
    from pirl.arguments import check_arguments
    from pirl.backends import open_backend
    from pirl.evaluate.images import check_images
    from pirl.logs import info, progress
    from pirl.outputs import check_shards_output
    from pirl.settings import items_of
    from pirl.storage import open_storage

    with step(f"{root}/runs/{run}", f"shard-{split}"):
        open_backend(backend, items_of(job)).require_access()
        if recipe:
            check_arguments(recipe, overrides, training, evaluation, model, metric, min_gain, registry)
        own = shards.sharding_options(options)
        images = shards.open_source(source, own)
        out = check_shards_output(f"{root}/data/{split}", images)
        notes = shards.compare_classes(shards.Manifest.load(open_storage(train_data)), images) if train_data else []
        for line in [*shards.summary(images), *notes]:
            info(line)
        manifest = shards.write_shards(
            images,
            out,
            processes=processes,
            max_bad_share=own.max_bad_share,
            decoding=own.decoding,
            progress=progress(f"sharding {split}"),
        )
        if train_data:
            check_images(train_data, out.uri)
        for line in shards.decoding_notes(manifest.decoding, manifest.pictures):
            info(line)
    return out.uri
