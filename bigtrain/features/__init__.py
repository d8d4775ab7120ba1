"""Feature transfer: what the frozen part of a model makes of every sample, computed once, and the head trained on that.

cutting   where the model is cut, and whether it can be
store     the features on the disk: written by all ranks, verified before they are used
using     a training that goes on with the head alone
"""

from bigtrain.features.using import Cached, use_features

__all__ = ["Cached", "use_features"]
