"""From files to loaded parts: read, quantized, offloaded, with LoRAs, kept in a pool. Knows no jobs, no evaluators."""
