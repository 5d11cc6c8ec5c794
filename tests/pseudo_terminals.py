"""A program on a pseudo-terminal, driven like by a person: waits for output, then types."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PROGRAM = "import sys; from llava_core.cli import main; main(sys.argv[1:])"
# Escape sequences: colours, and readline's mode switches.
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
_DEADLINE_S = 90.0


class PseudoTerminal:
    """`shown` is all output so far, including escape sequences."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process, self._descriptor = process, descriptor
        self.shown, self._seen = "", 0

    def expect(self, text: str) -> str:
        """Wait until this is shown after what was expected before; returns the output up to there, without escapes."""
        deadline = time.monotonic() + _DEADLINE_S
        while (end := self.shown.find(text, self._seen)) < 0:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} has not been shown: {self.shown[self._seen :]!r}"
            assert self._read(left), f"it ended before {text!r} was shown: {self.shown[self._seen :]!r}"
        before = self.shown[self._seen : end]
        self._seen = end + len(text)
        return _ESCAPES.sub("", before).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        """Type; a line ends with a carriage return, as the Enter key sends it."""
        os.write(self._descriptor, text.encode())

    def line(self, text: str) -> None:
        """Type a line once the prompt is shown."""
        self.expect(">>> ")
        self.type(f"{text}\r")

    def interrupt(self) -> None:
        """Press Ctrl-C once the program waits: `input` misses a signal that arrives between a key and its next wait."""
        deadline = time.monotonic() + _DEADLINE_S
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline, "it waits for nothing"
        self.type("\x03")

    def end(self) -> int:
        """Press Ctrl-D at the prompt; returns the program's exit status."""
        self.expect(">>> ")
        self.type("\x04")
        deadline = time.monotonic() + _DEADLINE_S
        while self._read(max(0.0, deadline - time.monotonic())):
            pass
        return self.process.wait(10)

    def _read(self, seconds: float) -> bool:
        readable, _, _ = select.select([self._descriptor], [], [], seconds)
        if not readable:
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:
            # Linux's error when nothing holds the other end any more.
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


@contextlib.contextmanager
def llava_at_a_terminal(*arguments: str, home: Path, **environment: str) -> Iterator[PseudoTerminal]:
    """Run `llava` with these arguments until the block ends, with a home folder of its own."""
    ours, theirs = pty.openpty()
    variables = {**os.environ, "HOME": str(home), "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("NO_COLOR", "XDG_STATE_HOME", "LLAVA_API_KEY", "INPUTRC"):
        variables.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=variables | environment,
        # A session of its own with this as its terminal, so that Ctrl-C reaches the program as a signal.
        start_new_session=True,
        preexec_fn=_take_terminal,
    ) as process:
        os.close(theirs)
        try:
            yield PseudoTerminal(process, ours)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    # Where the tests run in the background, SIGINT may be ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
