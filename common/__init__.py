"""What every script needs and no paper mentions."""

import struct
import sys
import types
import zipfile
import zlib

# TensorBoard's own switch for doing without TensorFlow, which it would import where that is installed: that
# takes seconds and memory of the GPU, and writes lines of its own.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))


class UserError(ValueError):
    """A user's mistake: one line says what was found, what was expected and what to do; shown without a
    traceback."""


def intact(path):
    """Compare each part of a file of torch.save() with its checksum, which torch.load() does not look at.

    Raises zipfile.BadZipFile where they differ, or if it is no such file.
    """
    try:
        with zipfile.ZipFile(path) as z:
            odd = z.testzip()
    except (EOFError, LookupError, RuntimeError, ValueError, struct.error, zlib.error) as e:
        raise zipfile.BadZipFile(str(e)) from e
    if odd:
        raise zipfile.BadZipFile(f"{odd} differs from its checksum")
