"""Why a service takes no request. Free of torch and of HTTP."""


class PromptTooLong(ValueError):
    """A prompt that leaves no room for an answer."""


class QueueFull(RuntimeError):
    """max_batch requests run and max_queue wait."""


class PredictionFailed(RuntimeError):
    """The predictor failed on this prompt."""


class ServiceClosed(RuntimeError):
    """No new requests: the server is shutting down, or its engine has failed."""
