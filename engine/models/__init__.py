"""The networks, and functions that call them. Knows nothing of jobs, files or devices."""
