"""The origin of a new run: weights of another network (`weights`), or all that an older run has learned (`warm`)."""
