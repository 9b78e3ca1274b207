"""Models: the registered students, and teachers as one frozen ensemble."""
