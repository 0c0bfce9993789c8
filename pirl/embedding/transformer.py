"""A transformer of scikit-learn: images in, features out, as one step of a `Pipeline`."""

from __future__ import annotations

from typing import Any

import numpy as np

from pirl.embedding.encoder import Encoder
from pirl.embedding.loading import load
from pirl.extras import require

require("sklearn", "pirl.Embedder")

from sklearn.base import BaseEstimator, TransformerMixin  # noqa: E402


class Embedder(TransformerMixin, BaseEstimator):
    """Images -> (n, D) float32 features by a frozen backbone. `fit` learns nothing.

    model: what `pirl.load` takes, or an `Encoder`. Images are what `Encoder.embed` takes: paths, PIL images, arrays.

        make_pipeline(pirl.Embedder("runs/mine"), LogisticRegression()).fit(paths, labels)
    """

    def __init__(self, model: Any = None, batch_size: int = 64, workers: int | None = None) -> None:
        self.model = model
        self.batch_size = batch_size
        self.workers = workers

    def fit(self, X: Any, y: Any = None) -> Embedder:
        """Load the backbone."""
        self.encoder_ = self.model if isinstance(self.model, Encoder) else load(self.model)
        self.n_features_out_ = self.encoder_.features
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return the features of the images."""
        if not self.__sklearn_is_fitted__():
            self.fit(X)
        return self.encoder_.embed(X, batch_size=self.batch_size, workers=self.workers).features

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return pirl0, pirl1, ... for `set_output`."""
        return np.array([f"pirl{i}" for i in range(self.n_features_out_)], dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "encoder_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        return tags
