"""images -> WebDataset shards with a manifest."""

from kfp import dsl

from components.step import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def shard(source: str, root: str, run: str, split: str, processes: int = 2) -> str:
    """Shard `source` (a folder, a list of files, or fashion-mnist:SPLIT) to ROOT/data/SPLIT; returns that URI."""
    from components.step import step
    from pirl.shards import open_source, write_shards
    from pirl.storage import open_storage

    out = open_storage(root) / "data" / split
    with step(f"{root}/runs/{run}", f"shard-{split}"):
        write_shards(open_source(source), out, processes=processes)
    return out.uri
