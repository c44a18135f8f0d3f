"""Checks once whether the Hugging Face Hub answers: its libraries would retry each file for half a
minute."""

from functools import lru_cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

PATIENCE_S = 5


@lru_cache
def answers() -> bool:
    """Return whether the Hub answers; True, without asking, if HF_HUB_OFFLINE=1. If it does not
    answer, its libraries use only their cache from here on, as with HF_HUB_OFFLINE=1."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception:  # from requests, httpx or another library
        constants.HF_HUB_OFFLINE = True
        return False
    return True
