"""What the command lines share: exit codes, and errors of one line."""

import argparse
from typing import NoReturn

BAD_INPUT = 2
INTERRUPTED = 130  # what a shell reports for SIGINT


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and carry the pointer to --help."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError with the message."""
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def one_line(error: BaseException) -> str:
    """An error's text, whatever it looks like, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__
