"""What keeps people out of trouble: lint, parameter groups, penalties."""
