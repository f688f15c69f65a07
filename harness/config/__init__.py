"""A run's configuration: its schema, how it is composed, and its checks."""
