"""What two or more ops use unchanged."""
