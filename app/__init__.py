"""What a person sees: page, command line, queue and worker. Imports the light ring of engine and of train."""
