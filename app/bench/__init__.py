"""`python launch.py bench`: every figure of docs/measurements.md, measured and written. Knows nothing of the page."""
