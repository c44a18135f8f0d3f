"""Everything that can go wrong with a file or a run, tried: damaged files (fuzz), killed runs (kill), or both."""
