"""The Hugging Face Hub: exporting a trained model, its card, pushing and pulling."""
