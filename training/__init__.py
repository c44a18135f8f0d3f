"""The parts of a run: flags, inputs, learners, run folder, results."""
