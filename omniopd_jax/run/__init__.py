"""What surrounds the method: checks before a run, its set-up and state, files, logs, profiles, the command line."""
