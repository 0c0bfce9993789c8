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
) -> str:
    """Shard `source` (a folder, a list of files, or fashion-mnist:SPLIT) to ROOT/data/SPLIT; return that URI.

    `options` (`pirl shard --help`) are NAME=VALUE items separated by blanks. The classes of test images are compared
    with those of the shards `train_data` before anything is written, and the account's rights are checked where
    `backend` starts a job later on.
    """
    from components.step import step
    from pirl.backends import open_backend
    from pirl.logs import info, progress
    from pirl.outputs import check_shards_output
    from pirl.settings import items_of
    from pirl.shards import (
        Manifest,
        compare_classes,
        decoding_notes,
        open_source,
        sharding_options,
        summary,
        write_shards,
    )
    from pirl.storage import open_storage

    with step(f"{root}/runs/{run}", f"shard-{split}"):
        open_backend(backend, items_of(job)).require_access()
        own = sharding_options(options)
        images = open_source(source, own)
        out = check_shards_output(f"{root}/data/{split}", images)
        notes = compare_classes(Manifest.load(open_storage(train_data)), images) if train_data else []
        for line in [*summary(images), *notes]:
            info(line)
        manifest = write_shards(
            images,
            out,
            processes=processes,
            max_bad_share=own.max_bad_share,
            decoding=own.decoding,
            progress=progress(f"sharding {split}"),
        )
        for line in decoding_notes(manifest.decoding, manifest.pictures):
            info(line)
    return out.uri
