"""The doors of the checkpoint store: other libraries' files in and out.

    sources           whatever holds weights, as a `bigtrain.state.Reader`
    base              frozen weights that a checkpoint leaves in another file
    exporting         a checkpoint as a Hugging Face folder, a safetensors or .pt file, a DCP or DeepSpeed folder
    incoming          one of these as a checkpoint

Both ways stream: what is held in memory grows with the largest tensor, not with the model. What a foreign pickle may
do stands in one module, `pickled`, which is entered only where the user allows it.
"""

from bigtrain.doors.sources import ForeignReader, open_weights, open_whole

__all__ = ["ForeignReader", "open_weights", "open_whole"]
