"""What only the demo needs: synthetic videos with a scripted teacher, and the tiny base model."""
