"""A valid ONNX file with a checksum, which never returns from its first batch."""

from pathlib import Path

from cifarx_serve.files.checksum import write_checksum
from tests.support.color_model import write_onnx


def write_endless_model(path: Path) -> Path:
    """Write the model of `color_model` with a loop of 2^62 steps, each of which adds nothing to the logits."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(write_onnx(path))
    step = helper.make_graph(
        [helper.make_node("Identity", ["go_on"], ["go_on_next"]), helper.make_node("Identity", ["sum"], ["sum_next"])],
        "step",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", 3]),
        ],
        [
            helper.make_tensor_value_info("go_on_next", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_next", TensorProto.FLOAT, ["batch", 3]),
        ],
    )
    model.graph.node[-1].output[0] = "finite"
    model.graph.node.append(helper.make_node("Loop", ["steps", "start", "finite"], ["logits"], body=step))
    model.graph.initializer.extend(
        [
            helper.make_tensor("steps", TensorProto.INT64, [], [1 << 62]),
            helper.make_tensor("start", TensorProto.BOOL, [], [True]),
        ]
    )
    path.write_bytes(model.SerializeToString())
    write_checksum(path)
    return path
