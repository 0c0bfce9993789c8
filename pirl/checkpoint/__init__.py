"""Checkpoints: one unit each, written by all ranks in the background, and published by a last small object.

    checkpoints/step-00000120/part-00000-of-00002-1f0c9a7e.safetensors   rank 0's share of the tensors, and the rest
    checkpoints/step-00000120/part-00001-of-00002-1f0c9a7e.safetensors   rank 1's
    checkpoints/step-00000120/COMMIT.json      size and SHA-256 of each part, cursor, digests; makes it complete
    checkpoints/LATEST.json                    the name of the newest, and of the one before
    lease/00000003.json                        holder of the lease of the run

The parts' names end with one token for each attempt, so that what a killed attempt left is never mixed with the next.
A checkpoint loads on any number of ranks. Nothing is unpickled.
"""

from pirl.checkpoint.commit import FORMAT, Commit, Cursor, Part
from pirl.checkpoint.lease import Lease
from pirl.checkpoint.state import Rows
from pirl.checkpoint.store import Checkpoints
from pirl.checkpoint.training import SavedBank, SavedTraining, saved_training

__all__ = [
    "FORMAT",
    "Checkpoints",
    "Commit",
    "Cursor",
    "Lease",
    "Part",
    "Rows",
    "SavedBank",
    "SavedTraining",
    "saved_training",
]
