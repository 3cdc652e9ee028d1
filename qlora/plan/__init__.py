"""What a run will take, before it runs: the training step itself, on tensors that have shapes and no bytes."""
