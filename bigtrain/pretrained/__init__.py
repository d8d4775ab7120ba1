"""Weights that a run starts from: found, matched with the model by name, read piece by piece into the engine.

matching    which tensor of the file goes where, and what the model keeps of its own
finding     the file or folder that `finetune.init_from` means
loading     each rank reads what it holds, under every engine
"""

from bigtrain.pretrained.finding import find_weights
from bigtrain.pretrained.loading import start_from
from bigtrain.pretrained.matching import LoadReport

__all__ = ["LoadReport", "find_weights", "start_from"]
