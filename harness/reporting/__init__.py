"""Statistics, tables and plots of a finished run."""
