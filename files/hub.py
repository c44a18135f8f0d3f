"""The Hugging Face Hub, asked once whether it is there: its libraries retry each file for half a
minute."""

from functools import lru_cache

from huggingface_hub import constants
from huggingface_hub.utils import get_session

PATIENCE_S = 5


@lru_cache
def answers() -> bool:
    """Whether the Hub answers; True if it is not to be asked. If it does not, its libraries use
    their cache alone from here on, as with HF_HUB_OFFLINE=1."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception:  # of requests, httpx or whatever the library uses
        constants.HF_HUB_OFFLINE = True
        return False
    return True
