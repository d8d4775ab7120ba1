"""The graph of a model for TensorBoard: its innermost modules in the order in which they ran, and what feeds what.

Seen by hooks in one real forward pass, so any model will do; what a model computes between its modules is not a node.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_INPUT = "input"


class GraphRecorder:
    """Watches the next forward pass of a model.

    Args:
        model: The plain module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name.replace(".", "/") or "model" for name, module in model.named_modules()}
        self._made_by: dict[int, str] = {}
        self._kept: list[Tensor] = []  # so that no number of a tensor is given to another
        self._last = _INPUT
        self.nodes: list[tuple[str, str, list[str]]] = [(_INPUT, "Input", [])]
        leaves = [module for module in self._names if not any(module.children())]
        self._handles: list[RemovableHandle] = [leaf.register_forward_hook(self._see) for leaf in leaves]
        self._handles.append(model.register_forward_hook(self._end))

    def _see(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        name = self._names[module]
        again = sum(node == name or node.startswith(f"{name}_") for node, _, _ in self.nodes)
        name = f"{name}_{again}" if again else name
        sources = dict.fromkeys(self._made_by.get(id(tensor), self._last) for tensor in _tensors(inputs))
        self.nodes.append((name, type(module).__name__, list(sources)))
        for tensor in _tensors(outputs):
            self._made_by[id(tensor)] = name
            self._kept.append(tensor)
        self._last = name

    def _end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()
        self._made_by.clear()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def write_graph(recorder: GraphRecorder, folder: Path) -> bool:
    """Write what was seen into a run's folder for TensorBoard; whether there was anything."""
    from tensorboard.compat.proto import event_pb2, graph_pb2, node_def_pb2, versions_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    recorder.close()
    if len(recorder.nodes) < 2:
        return False
    nodes = [node_def_pb2.NodeDef(name=name, op=op, input=sources) for name, op, sources in recorder.nodes]
    graph = graph_pb2.GraphDef(node=nodes, versions=versions_pb2.VersionDef(producer=22))
    writer = EventFileWriter(str(folder / "tensorboard"), filename_suffix=".graph")
    writer.add_event(event_pb2.Event(wall_time=0.0, graph_def=graph.SerializeToString()))
    writer.close()
    return True
