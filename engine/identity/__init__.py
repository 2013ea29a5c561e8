"""Is everyone recognisable? Evaluators look at frames, a reporter sums up. Knows nothing of how a clip is made."""
