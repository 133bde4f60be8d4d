"""``python -m packc doctor``: whether packc works on this machine, and what it finds there."""
