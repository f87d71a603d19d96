"""Where in the user's own code an error was raised."""

from __future__ import annotations

import os
import traceback

__all__ = ["user_frame"]

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def user_frame(error: Exception) -> str | None:
    """``file:line`` of the innermost frame that is neither ours nor a library's."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        ours = frame.filename.startswith(_HERE)
        library = "site-packages" in frame.filename or f"{os.sep}lib{os.sep}python" in frame.filename
        if not ours and not library and not frame.filename.startswith("<"):
            return f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return None
