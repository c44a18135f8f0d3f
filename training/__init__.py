"""What a run is made of: flags, inputs, learners, its folder, its results."""
