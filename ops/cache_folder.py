"""Whether a file may be executed: not where another user could have written it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def writable_by_others(file: Path) -> Path | None:
    """The file itself, or a folder on the way to it, that a user other than this one and root may write to.

    What a group may write counts as written by its members. Folders above the file's own may be open to this user's own
    group, as where every user has one, and to everybody where nobody can replace what is another's, as in ``/tmp``.
    """
    if not hasattr(os, "getuid"):  # Windows, whose folders of users are their own
        return None
    file = file.resolve()
    for level, path in enumerate((file, *file.parents)):
        info = path.stat()
        writers = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if level > 1:
            if info.st_mode & stat.S_ISVTX:
                writers = 0
            elif info.st_gid == os.getgid():
                writers &= stat.S_IWOTH
        if writers or info.st_uid not in (0, os.getuid()):
            return path
    return None
