"""pytest's capture files are closed by pytest alone.

absl's log handler keeps the sys.stderr of its import, which is such a file. uvicorn's configuration
of logging closes all handlers, and this one closes its file: every later test then failed with
"I/O operation on closed file".
"""

import io
import os
import sys
import tempfile

from _pytest import capture


class CaptureBuffer(io.FileIO):
    """A temporary file that only the end of its capture closes."""

    def close(self):
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename == capture.__file__ and frame.f_code.co_name == "done":
                super().close()
                return
            frame = frame.f_back


def capture_buffer(buffering: int = 0) -> CaptureBuffer:
    """As tempfile.TemporaryFile(buffering=0)."""
    with tempfile.TemporaryFile(buffering=buffering) as file:
        return CaptureBuffer(os.dup(file.fileno()), "r+")


def keep_capture_files(config):
    """Begin the capture of the session anew, with such files."""
    manager = config.pluginmanager.getplugin("capturemanager")
    if manager is None or not manager.is_globally_capturing():
        return
    capture.TemporaryFile = capture_buffer
    manager.stop_global_capturing()
    manager.start_global_capturing()
    manager.suspend_global_capture()
