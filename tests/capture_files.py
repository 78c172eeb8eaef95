"""pytest's capture files are closed by pytest alone; others are refused, and named in a warning.

In one run of CI something closed them between two tests, and the 2,200 tests after it failed with
"I/O operation on closed file".
"""

import io
import os
import tempfile
import traceback
import warnings

from _pytest import capture


class CaptureBuffer(io.FileIO):
    """A temporary file that only the end of its capture closes."""

    def close(self):
        stack = traceback.extract_stack()
        if any(frame.filename == capture.__file__ and frame.name == "done" for frame in stack):
            super().close()
        else:
            places = "".join(stack.format())
            warnings.warn(f"a capture file was to be closed by\n{places}", stacklevel=2)


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
