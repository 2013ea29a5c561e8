"""The embedded checkpoint: its drawn world, its recipe, its judges and its benchmark. Nothing generic lives here."""
