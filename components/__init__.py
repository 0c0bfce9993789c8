"""One KFP component for each step of the pipeline: parameters in, one call of the library, metadata out."""
