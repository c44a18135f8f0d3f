"""Files that are whole or not there: written beside, synced and renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import UserError

from safetensors import SafetensorError


def refuse_existing(path: str | Path, remedy: str) -> Path:
    """The path, where nothing is there yet and its folder can be written to; UserError with the
    remedy else."""
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(f"{path} exists already; {remedy}")
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(
            f"{path} cannot be written: {above} is not a folder that can be written to; {remedy}"
        )
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A path to write a file or folder at; only when the block ends well is it synced and takes its
    real name.

    Whatever interrupts, `path` is either as it was or whole. What a killed process left beside it
    is removed first, so that there may be one writer of a path at a time. UserError where the disk
    is full or cannot be written to.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(tmp)
        yield tmp
        umask = os.umask(0)
        os.umask(umask)
        for written in [*tmp.rglob("*"), tmp]:
            if written.is_file():  # safetensors writes files that only their owner can read
                with suppress(OSError):  # some mounts have no permissions
                    written.chmod(0o666 & ~umask)
            sync(written)
        os.replace(tmp, path)
        sync(path.parent)  # the rename itself
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}); free some space, or choose another place"
        ) from error
    finally:
        _remove(tmp)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of names, before anything else is done."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of a mount that has no such thing
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
