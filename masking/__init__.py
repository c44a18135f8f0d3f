"""A model under learnable masks: its layers, their logits, the masks drawn from them."""
