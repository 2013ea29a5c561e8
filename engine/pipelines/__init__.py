"""The journeys of the engine, and the steps that they share. Knows nothing of pages, queues or processes."""
