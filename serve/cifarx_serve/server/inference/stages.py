"""The stages of a request as spans of its trace: what `Classification` and `InferenceResult` know about their times."""

from cifarx_serve.server.inference.batcher import InferenceResult
from cifarx_serve.server.inference.classification import Classification
from cifarx_serve.server.inference.model import ServedModel
from cifarx_serve.server.tracing.request_span import RequestSpan


def record_classification(span: RequestSpan, model: ServedModel, result: Classification, images: int) -> None:
    """Add the stages of a request with image files: decode, and queue and compute for every batch it was part of."""
    record_decoding(span, result.decode_started_at, result.decode_s, images)
    for inference in result.inferences:
        record_inference(span, model, inference)


def record_decoding(span: RequestSpan, started_at: float, seconds: float, images: int) -> None:
    """Add the stage in which image files were decoded."""
    span.add_stage("decode", started_at, seconds, {"cifarx.images": images})


def record_inference(span: RequestSpan, model: ServedModel, result: InferenceResult) -> None:
    """Add the stages in which images waited for the model, and in which it ran them, alone or with those of others."""
    images = result.rows.stop - result.rows.start
    attributes = {"cifarx.model.name": model.name, "cifarx.model.version": model.version, "cifarx.images": images}
    span.add_stage("queue", result.started_at - result.queue_s, result.queue_s, attributes)
    attributes = {**attributes, "cifarx.batch.images": len(result.output.values)}
    span.add_stage("compute", result.started_at, result.compute_s, attributes)
