"""The paper in miniature: docs/miniature.md says what it found, and how."""
