"""What every script needs and no paper mentions."""

import struct
import zipfile
import zlib


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
