"""Output that cannot be written does not end a program.

With `| tee log`, Ctrl-C ends tee, too, and with `| head`, head ends after ten lines. Then, and when
a terminal is closed, printing raises an error. A training would lose the steps since its last
checkpoint because of a line for the screen.
"""
import errno
import os
import sys

# The reader of the output is gone: a closed pipe, a closed terminal, a closed file. After other
# errors, such as a full disk, the next line may succeed.
GONE = {errno.EPIPE, errno.EIO, errno.EBADF}


def protect_output():
    """Replace sys.stdout and sys.stderr by streams whose write never raises OSError."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:                                    # closed before Python started
            stream = open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            # With LANG=C, print would raise an error for class names with non-ASCII letters.
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Output):
            stream = Output(stream)
        setattr(sys, name, stream)


class Output:
    """A text stream that drops what it cannot write. Other attributes are those of the stream."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except OSError as error:
            self.handle(error)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.handle(error)

    def handle(self, error):
        """If nobody reads the stream any more, write to /dev/null from now on, and say so on the
        other stream. Without this, Python would fail again when it exits (status 120)."""
        if error.errno not in GONE:
            return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)
        other = sys.stderr if self is sys.stdout else sys.stdout
        other.write(f"\nnote: the output can no longer be written ({error.strerror}); the "
                    f"program continues\n")
