"""Atomic writes: a file is written under a temporary name, synced and renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import UserError

from safetensors import SafetensorError


def refuse_existing(path: str | Path, remedy: str) -> Path:
    """Return the path. Raises UserError, which ends with `remedy`, if it exists already or its
    folder cannot be written to."""
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; {remedy}")
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(
            f"{path} cannot be written: {nearest} is not a folder that can be written to; {remedy}"
        )
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write a file or folder to. When the block ends without an error, it
    is synced and renamed to `path`.

    Whatever interrupts, `path` is either as before or complete. The temporary path is removed
    first, in case a killed process left it, so only one process may write a path at a time. Raises
    UserError if the disk is full or cannot be written to.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(tmp)
        yield tmp
        umask = os.umask(0)
        os.umask(umask)
        for entry in [*tmp.rglob("*"), tmp]:
            if entry.is_file():  # safetensors writes files that only the owner can read
                with suppress(OSError):  # some mounts do not support permissions
                    entry.chmod(0o666 & ~umask)
            sync(entry)
        os.replace(tmp, path)
        sync(path.parent)  # the rename itself
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); free some space, or choose another place"
        ) from error
    finally:
        _remove(tmp)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the mount has no fsync
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
