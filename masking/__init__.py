"""Learnable masks on a model: its masked layers, their logits, and the masks drawn from them."""
