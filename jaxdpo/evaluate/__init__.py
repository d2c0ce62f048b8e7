"""What a trained policy is worth, and how methods compare."""
