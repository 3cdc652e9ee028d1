"""What leaves the house: adapters that others can load."""
