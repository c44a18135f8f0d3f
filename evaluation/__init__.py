"""How good a model is besides its perplexity: zero-shot tasks, and records compared in a table."""
