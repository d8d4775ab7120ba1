"""The checkpoint store: one format on disk for every engine and number of ranks. It knows no engine.

    Ranks             who writes and reads together                                          ranks
    save, bytes_of    write the state of all ranks and commit it                             writing
    check_space       whether checkpoints will fit on the disk                               writing
    Background        the same in a thread, while the training goes on                       background
    find, newest      which checkpoints there are, newest first; which is to be taken        folders
    prune             remove old ones                                                        folders
    find_best, best_of    which of them is the best                                          best
    open_checkpoint   a `bigtrain.state.Reader` of one                                       reading
    load_newest       go on from the newest good one, on all ranks                           choosing
    verify, diff, describe                                                                   looking

A checkpoint is a folder with manifest.json (manifest.py has its format), state.json, and for every rank that wrote a
shard file (shards.py has its format). There is no pickle in it, and none is read from it.
"""

from bigtrain.checkpoint.background import Background
from bigtrain.checkpoint.best import best_of, find_best
from bigtrain.checkpoint.choosing import load_newest
from bigtrain.checkpoint.folders import find, newest, prune
from bigtrain.checkpoint.looking import describe, diff, verify
from bigtrain.checkpoint.ranks import Ranks
from bigtrain.checkpoint.reading import CheckpointReader, open_checkpoint
from bigtrain.checkpoint.writing import bytes_of, check_space, save

__all__ = [
    "Background",
    "CheckpointReader",
    "Ranks",
    "best_of",
    "bytes_of",
    "check_space",
    "describe",
    "diff",
    "find",
    "find_best",
    "load_newest",
    "newest",
    "open_checkpoint",
    "prune",
    "save",
    "verify",
]
