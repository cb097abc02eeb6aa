"""The exceptions of this package that Python does not have already."""


class NoViableBackendError(RuntimeError):
    """No backend that the caller allows can run the call; the message holds every backend's reasons.

    A `RuntimeError`, as in torch ("No available kernel. Aborting execution."), raised while tracing when no platform could
    run the call, else while lowering for the platform that can't: always before any device work.
    """
