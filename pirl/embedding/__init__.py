"""Features of any images by a pretrained backbone.

`loading`: an `Encoder` from a run, a registered version or a file. `images`: images by their place, or in memory.
`encoder`: features in batches, with bounded memory. `output`: features as npz, parquet or csv. `search`: nearest
neighbours. `transformer`: scikit-learn's protocol.
"""

from pirl.embedding.encoder import Batch, Embeddings, Encoder
from pirl.embedding.images import Images, open_images
from pirl.embedding.loading import load

__all__ = ["Batch", "Embeddings", "Encoder", "Images", "load", "open_images"]
