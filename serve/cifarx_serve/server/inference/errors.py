"""Errors of inference. They carry no HTTP status: `cifarx_serve.server.api.errors` assigns one to each."""

from cifarx_serve.errors import CifarxError


class InferenceError(CifarxError):
    """Base class of the reasons why a request is not answered with predictions."""


class ModelNotFound(InferenceError):
    """No model is served under the requested name, or not in the requested version."""


class ModelNotReady(InferenceError):
    """The model is still being loaded."""


class ModelFailed(InferenceError):
    """The model fails on every input."""


class InvalidInput(InferenceError):
    """The model cannot run on the images of this request; it still runs on others."""


class ModelControlError(InferenceError):
    """A model cannot be loaded or unloaded as a client requests."""


class QueueFull(InferenceError):
    """The model's queue has no capacity left for the images of this request."""


class BatcherClosed(InferenceError):
    """The batcher was closed while the request was queued."""


class DecoderUnavailable(InferenceError):
    """No process can be started to decode images."""


class DeadlineExceeded(InferenceError):
    """The request's deadline has passed."""


class RequestCancelled(Exception):
    """The client disconnected before its images were run, so there is nobody to answer."""
