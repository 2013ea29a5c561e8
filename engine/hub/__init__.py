"""Files from the Hub, and pickles made safe: what is where, what a fetch will bring, the bytes. Knows no models."""
