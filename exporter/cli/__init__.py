"""The command line. Nothing heavy is imported here: rooms are opened inside the commands."""
