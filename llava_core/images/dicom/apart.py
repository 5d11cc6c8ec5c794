"""Decoding in a process of its own, for plugins that do not raise where a frame is damaged: GDCM and CharLS.

A damaged frame of lossless JPEG is a C++ exception in GDCM that nobody catches, or worse; one of JPEG-LS, of two
kilobytes, can keep CharLS busy for a quarter of a minute. Here it is a child that fails or is ended, and what it prints
is thrown away. The price is an interpreter's start, some tenths of a second. Knows no headers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import BinaryIO

# Longer than the largest picture takes on a busy machine.
_TIMEOUT_S = 30.0
# It decodes one frame: further threads would only cost their start.
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def decode_apart(syntax: str, plugin: str, envelope: bytes, options: Mapping[str, object]) -> bytes:
    """The values of the frame in its envelope as bytes, as pydicom's decoder has them. Raises ValueError."""
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
        # Nothing of it, which holds the whole frame.
        raise ValueError("the frame cannot be decoded") from None
    return child.stdout


def main(given: BinaryIO, answer: BinaryIO) -> None:
    """The child's part."""
    asked = json.loads(given.readline())
    decoder = import_module("pydicom.pixels").get_decoder(asked["syntax"])
    values, _ = decoder.as_array(given.read(), index=0, decoding_plugin=asked["plugin"], **asked["options"])
    answer.write(values.tobytes())


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
