"""The Triton engine. ``engine`` is its face; the rooms are one module each. Importing this package does not import triton."""
