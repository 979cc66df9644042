"""What a training is made of: trainers, the loop, checkpoints, trackers."""
