"""What `make demo` runs on: see README.md here."""
