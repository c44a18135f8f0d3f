"""How good a model is: perplexity, zero-shot accuracy, and a table of several models' records."""
