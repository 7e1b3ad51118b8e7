"""Ways to lay parts out as the tensors of a checkpoint, one a file."""
