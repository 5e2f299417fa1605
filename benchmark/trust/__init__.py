"""The costly checks, of `robench doctor`: attacks that are themselves put to the test."""
