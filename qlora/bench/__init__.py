"""What training takes, by method: memory, time and losses of ours and others' doing the same work, measured in turn."""
