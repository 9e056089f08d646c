"""The commands of `musekit`, one module each."""
