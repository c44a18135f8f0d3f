"""A causal language model as it is used: loaded, looked into, run, and spread over devices and
processes."""
