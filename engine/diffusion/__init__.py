"""From noise to latents: conditionings, guidance, solvers, step cache. Knows nothing of files or pictures."""
