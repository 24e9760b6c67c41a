"""Ready-made data, models and callbacks for the command line, to use or to copy from."""
