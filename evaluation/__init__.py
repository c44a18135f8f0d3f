"""Evaluation: perplexity, zero-shot accuracy, and a table that compares several models."""
