"""Evaluation: the loss on held-out rows, and answers that are counted right or wrong."""
