"""What is wrong with a file, in one line."""
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import UserError

import torch


@contextmanager
def explained(what: str | Path, advice: str) -> Iterator[None]:
    """Turn whatever reading raises into a UserError that begins with `what`: parsers share no class of error."""
    try:
        yield
    except torch.OutOfMemoryError:  # `run_script` has better advice
        raise
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error.__cause__ or error}"
        raise UserError(f"{what} cannot be read ({' '.join(reason.split())[:300]}); {advice}") from error
