"""What a run of train.py is made of: flags, inputs, learners, its folder, its results."""
