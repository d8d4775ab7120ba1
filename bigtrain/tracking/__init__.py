"""Numbers out, and in again: the metrics file, the terminal, W&B and TensorBoard; reading what a run has written.

Rows of numbers go to the trackers of base.py: metrics.jsonl (jsonl) and the terminal (console) in the training process,
W&B, TensorBoard and the user's own in a process beside it (outside, helper). reading.py reads what a run left.
"""
