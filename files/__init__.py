"""Bytes on disk: written whole or not at all, read with trust in nothing they claim."""
