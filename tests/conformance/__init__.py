"""PEFT's own test classes, from the sdist of the installed version, run over this package's adapter types."""
