"""Errors in logs: what and where, never the message, which may quote what a client sent."""

from traceback import format_tb


def trace(error: BaseException) -> str:
    """The error's type and the lines it passed through."""
    return type(error).__name__ + "\n" + "".join(format_tb(error.__traceback__))
