"""What every script needs and no paper mentions."""

import struct
import sys
import types
import zipfile
import zlib

# Keep TensorBoard from importing TensorFlow, if installed: that takes seconds and GPU memory, and prints its
# own log.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("tensorboard.compat.notf"))


class UserError(ValueError):
    """A user's mistake: one line says what was found, what was expected and what to do; shown without a
    traceback."""


def intact(path):
    """Verify the checksums in a file written by torch.save(); torch.load() ignores them.

    Raises zipfile.BadZipFile if one does not match, or if the file is no zip archive.
    """
    try:
        with zipfile.ZipFile(path) as z:
            odd = z.testzip()
    except (EOFError, LookupError, RuntimeError, ValueError, struct.error, zlib.error) as e:
        raise zipfile.BadZipFile(str(e)) from e
    if odd:
        raise zipfile.BadZipFile(f"{odd} differs from its checksum")
