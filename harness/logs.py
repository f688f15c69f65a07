"""Where the messages of a command go: to the terminal, in plain lines above the progress bars.

Modules write to `logging.getLogger(__name__)`. What a user asked for, such as the plan, a table or
a listing, is printed to standard output instead.
"""

import logging
import sys

from tqdm import tqdm

_FORMATS = {logging.ERROR: "error: %(message)s"}


class TerminalHandler(logging.Handler):
    """Writes a message to standard error, and leaves the progress bars whole."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        tqdm.write(self.format(record), file=sys.stderr)

    def format(self, record: logging.LogRecord) -> str:
        """Return the message; an error says that it is one."""
        return logging.Formatter(_FORMATS.get(record.levelno, "%(message)s")).format(record)


def log_to_terminal() -> None:
    """Send what the harness and the library log from here on to the terminal."""
    for package, level in (("harness", logging.INFO), ("phatgoose", logging.WARNING)):
        logger = logging.getLogger(package)
        if not any(isinstance(handler, TerminalHandler) for handler in logger.handlers):
            logger.addHandler(TerminalHandler())
            logger.setLevel(level)
