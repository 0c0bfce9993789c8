"""The sharding as a step: images -> WebDataset shards with a manifest."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def shard(source: str, root: str, run: str, split: str, train_data: str = "", processes: int = 2) -> str:
    """Shard `source` (a folder, a list of files, or fashion-mnist:SPLIT) to ROOT/data/SPLIT; return that URI.

    The classes of test images are compared with those of the shards `train_data`, before a training is paid for.
    """
    from components.step import step
    from pirl.logs import say
    from pirl.shards import compare_shards, decoding_notes, open_source, summary, write_shards
    from pirl.storage import open_storage

    out = open_storage(root) / "data" / split
    with step(f"{root}/runs/{run}", f"shard-{split}"):
        images = open_source(source)
        manifest = write_shards(images, out, processes=processes)
        notes = compare_shards(train_data, out.uri) if train_data else []
        for line in [*summary(images), *decoding_notes(manifest.decoding, manifest.pictures), *notes]:
            say(line)
    return out.uri
