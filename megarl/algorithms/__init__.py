"""Pure tensor maths of the RL methods."""
