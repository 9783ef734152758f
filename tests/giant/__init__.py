"""Tests of organs/giant; a package, so that a module here may be called as one beside it."""
