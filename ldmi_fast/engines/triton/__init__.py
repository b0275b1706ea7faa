"""The Triton engine. ``engine`` has its ops; each op is one module. Importing this package does not import triton."""
