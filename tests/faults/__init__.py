"""What can go wrong with a run, tried: runs killed at random moments, states torn."""
