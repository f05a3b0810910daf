"""What model.py and the stages are built on; README.md says what is where."""
