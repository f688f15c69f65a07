"""Plan a prepared run before any actor starts."""
