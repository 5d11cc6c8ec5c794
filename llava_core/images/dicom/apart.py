"""Decoding in a separate process, for plugins that do not raise an exception on a damaged frame: GDCM and CharLS.

A damaged lossless JPEG frame causes an uncaught C++ exception in GDCM, or worse; a JPEG-LS frame of two kilobytes can
keep CharLS busy for a quarter of a minute. Here only a child process fails or is killed, and its output on stderr is
discarded. The price is starting an interpreter, some tenths of a second. Knows no headers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import BinaryIO

# Longer than decoding the largest picture takes on a busy machine.
_TIMEOUT_S = 30.0
# The child decodes one frame: more threads would only cost their startup.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def decode_apart(syntax: str, plugin: str, envelope: bytes, options: Mapping[str, object]) -> bytes:
    """The values of an encapsulated frame as bytes, as pydicom's decoder returns them. Raises ValueError."""
    head = json.dumps({"syntax": syntax, "plugin": plugin, "options": options}).encode() + b"\n"
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input=head + envelope,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=True,
            env={**os.environ, **_ENVIRONMENT},
        )
    except (subprocess.SubprocessError, OSError):
        # The original exception is dropped, because it holds the whole frame.
        raise ValueError("the frame cannot be decoded") from None
    return child.stdout


def main(given: BinaryIO, answer: BinaryIO) -> None:
    """Run in the child process: decode the frame from `given` and write its values to `answer`."""
    asked = json.loads(given.readline())
    decoder = import_module("pydicom.pixels").get_decoder(asked["syntax"])
    values, _ = decoder.as_array(given.read(), index=0, decoding_plugin=asked["plugin"], **asked["options"])
    answer.write(values.tobytes())


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
