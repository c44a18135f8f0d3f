"""Causal language models: loading, finding layers, running, and spreading over devices and
processes."""
