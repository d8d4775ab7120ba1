"""A trained model out of a checkpoint, whatever engine trained it: measured, or asked for predictions.

It runs in one process and knows no optimizer.
"""

from bigtrain.evaluating.answers import Prediction
from bigtrain.evaluating.measuring import Measured, evaluate
from bigtrain.evaluating.predicting import predict
from bigtrain.evaluating.trained import Trained, find_checkpoint, load_trained, opened

__all__ = ["Measured", "Prediction", "Trained", "evaluate", "find_checkpoint", "load_trained", "opened", "predict"]
