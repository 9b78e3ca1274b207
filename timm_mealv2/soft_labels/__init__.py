"""What an ensemble predicts for random crops of the training images: recorded once, trained on as often as wanted."""
