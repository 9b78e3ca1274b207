"""Data: from image files to batches, each sample a function of (seed, epoch, image)."""
