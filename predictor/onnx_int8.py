"""Quantises an encoder's ONNX model to 8 bits.

A weight has one scale for each output, an activation one for each token (as in LLM.int8, arXiv
2208.07339): a token's outputs depend on nothing else in the batch, and a large value reduces only
its own token's precision. onnxruntime's quantize_dynamic has one scale for a whole batch, so that a
prompt's vector would depend on its neighbours.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

LARGE_VOCABULARY = 1000  # rows; smaller embeddings stay as they are
PREFIX = "q8"  # of the names of shared constants


def quantise(file: Path) -> None:
    """Rewrite an ONNX model's matrix products with weights, and large embeddings, to 8 bits."""
    import onnx

    model = onnx.load(str(file))
    Quantiser(model).rewrite()
    onnx.save(model, str(file))


class Quantiser:
    """Rewrites the graph of one ONNX model.

    Attributes:
        weights: {name: tensor} of the model's float matrices.
        nodes, constants: of the new graph, in the order in which they were added.
    """

    def __init__(self, model: "ModelProto") -> None:
        from onnx import TensorProto

        self.model = model
        self.weights: dict[str, TensorProto] = {}
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 2 and tensor.data_type == TensorProto.FLOAT:
                self.weights[tensor.name] = tensor
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._quantised_tokens: dict[str, tuple[str, str, str]] = {}
        self._quantised_weights: set[str] = set()
        self.one = self._constant(f"{PREFIX}.one", np.float32(1))
        self.last = self._constant(f"{PREFIX}.last", np.array([1], np.int64))
        self.step = self._constant(f"{PREFIX}.step", np.float32(1 / 127))
        self.least = self._constant(f"{PREFIX}.least", np.float32(1e-12))
        self.flat = self._constant(f"{PREFIX}.flat", np.array([-1], np.int64))
        self.zero = self._constant(f"{PREFIX}.zero", np.uint8(128))
        self.zeros = self._constant(f"{PREFIX}.zeros", np.array([128], np.uint8))

    def rewrite(self) -> None:
        """Replace the model's nodes and weights, in place."""
        from onnx import helper

        graph = self.model.graph
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in self.weights:
                self._quantise_product(node)
            elif self._is_large_embedding(node):
                self._quantise_embedding(node)
            else:
                self.nodes.append(node)
        wanted: set[str] = set()
        for node in self.nodes:
            wanted.update(node.input)
        tensors = []
        for tensor in [*graph.initializer, *self.constants]:
            if tensor.name in wanted:
                tensors.append(tensor)
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(tensors)
        domains = {opset.domain for opset in self.model.opset_import}
        if "com.microsoft" not in domains:
            self.model.opset_import.append(helper.make_opsetid("com.microsoft", 1))

    def _constant(self, name: str, value: Any) -> str:
        """Add a constant tensor; returns its name."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node of one output; returns the output's name."""
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _quantise_tokens(self, x: str, width: int) -> tuple[str, str, str]:
        """(uint8 (tokens, width), scales (tokens, 1), shape of x without its last axis).

        Made once where several products read x.
        """
        if x in self._quantised_tokens:
            return self._quantised_tokens[x]
        add, k = self._add, f"{x}.q8"
        shape = self._constant(f"{k}.rows.shape", np.array([-1, width], np.int64))
        rows = add("Reshape", [x, shape], f"{k}.rows")
        size = add("Abs", [rows], f"{k}.size")
        largest = add("ReduceMax", [size, self.last], f"{k}.largest", keepdims=1)
        scaled = add("Mul", [largest, self.step], f"{k}.scaled")
        scale = add("Max", [scaled, self.least], f"{k}.scale")
        scales = add("Reshape", [scale, self.flat], f"{k}.scales")
        count = add("Shape", [scales], f"{k}.count")
        middle = add("Expand", [self.zeros, count], f"{k}.middle")
        integers = add("QuantizeLinear", [rows, scales, middle], f"{k}.integers", axis=0)
        outer = add("Shape", [x], f"{k}.outer", end=-1)
        self._quantised_tokens[x] = integers, scale, outer
        return integers, scale, outer

    def _quantise_weight(self, name: str, axis: int) -> tuple[str, str]:
        """(int8 weight, its scales), one scale for each slice along the other axis.

        Made once where a weight is used twice.
        """
        from onnx import numpy_helper

        key = f"{name}.q8.{axis}"
        if key not in self._quantised_weights:
            value = numpy_helper.to_array(self.weights[name])
            scale = np.abs(value).max(axis=axis, keepdims=True) / 127
            scale = np.maximum(scale, 1e-12).astype(np.float32)
            self._constant(key, np.round(value / scale).astype(np.int8))
            self._constant(f"{key}.scale", scale.reshape(-1) if axis == 0 else scale)
            self._quantised_weights.add(key)
        return key, f"{key}.scale"

    def _quantise_product(self, node: "NodeProto") -> None:
        out, (x, name) = node.output[0], node.input
        width, columns = self.weights[name].dims
        integers, scale, outer = self._quantise_tokens(x, width)
        weight, scales = self._quantise_weight(name, 0)
        product = self._add(
            "MatMulIntegerToFloat",
            [integers, weight, self.one, scales, self.zero],
            f"{out}.q8.product",
            domain="com.microsoft",
        )
        product = self._add("Mul", [product, scale], f"{out}.q8.scaled")
        end = self._constant(f"{out}.q8.columns", np.array([columns], np.int64))
        shape = self._add("Concat", [outer, end], f"{out}.q8.shape", axis=0)
        self._add("Reshape", [product, shape], out)

    def _quantise_embedding(self, node: "NodeProto") -> None:
        from onnx import TensorProto

        out, (name, ids) = node.output[0], node.input
        table, scales = self._quantise_weight(name, 1)
        row = self._add("Gather", [table, ids], f"{out}.q8.row")
        row = self._add("Cast", [row], f"{out}.q8.float", to=TensorProto.FLOAT)
        scale = self._add("Gather", [scales, ids], f"{out}.q8.scale")
        self._add("Mul", [row, scale], out)

    def _is_large_embedding(self, node: "NodeProto") -> bool:
        if node.op_type != "Gather" or node.input[0] not in self.weights:
            return False
        return self.weights[node.input[0]].dims[0] > LARGE_VOCABULARY
