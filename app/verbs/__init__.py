"""What `python launch.py VERB` does, one module a verb. Parsed in app/cli.py; nothing here knows the page."""
